"""On-policy text hangs on nothing but model, prompt and options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unmix.core.errors import DataError, ModelError, ResumeError
from unmix.core.policy import InputPolicy
from unmix.data.config import SPEAKERS
from unmix.lm import LanguageModel
from unmix.lm.rollouts import FILE, HALF, RolloutConfig, answer_speakers, write_rollouts

from .families import raw_model

POLICY = InputPolicy(bos="context", bos_id=1, separator_id=0)
TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def lm(tiny_tokenizer_folder: Path) -> LanguageModel:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    return LanguageModel(raw_model("llama", vocab_size=512).requires_grad_(False), "tiny", tokenizer)


def prompts(folder: Path, *lines: str, name: str = "prompts.txt") -> str:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]


def config(place: str, **changes: Any) -> RolloutConfig:
    return RolloutConfig(prompts=place, policy=POLICY, **{"samples": 2, "new_tokens": 6, **changes})


def test_prompts_are_the_user_s_and_what_follows_the_assistant_s(lm: LanguageModel, tmp_path: Path) -> None:
    made = write_rollouts(lm, config(prompts(tmp_path, "import this", "def f")), tmp_path / "r")
    found = rows(tmp_path / "r")
    assert [(row["prompt"], row["sample"]) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert made.rows == 4 and made.tokens == sum(len(row["ids"]) + 1 for row in found)
    prompt = lm.encode_text("import this", POLICY).tolist()
    for row in found[:2]:
        assert row["ids"][: len(prompt)] == prompt
        who = [SPEAKERS[s] for s in row["speakers"]]
        assert who == ["none", *["user"] * (len(prompt) - 1), *["assistant"] * (len(row["ids"]) - len(prompt))]
        assert row["text"] == lm.decode(row["ids"][len(prompt) :])
    assert found[0]["ids"] != found[1]["ids"]


def test_order_and_company_of_prompts_change_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    write_rollouts(lm, config(prompts(tmp_path, "import this", "def f", "class")), tmp_path / "a")
    write_rollouts(lm, config(prompts(tmp_path, "class", "import this", name="b.txt")), tmp_path / "b")
    one, other = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [row["ids"] for row in one[:2]] == [row["ids"] for row in other[2:]]
    assert [row["ids"] for row in one[4:]] == [row["ids"] for row in other[:2]]


def test_a_killed_call_goes_on_and_ends_the_same(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unmix.lm import rollouts

    told = config(prompts(tmp_path, "import this", "def f", "class"))
    write_rollouts(lm, told, tmp_path / "whole")
    real, calls = rollouts.continuations, []

    def dies(*arguments: Any) -> Any:
        calls.append(arguments[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(rollouts, "continuations", dies)
    with pytest.raises(KeyboardInterrupt):
        write_rollouts(lm, told, tmp_path / "r")
    half = tmp_path / "r" / HALF
    half.write_bytes(half.read_bytes() + b'{"ids": [1, 2')  # a line that the kill cut
    write_rollouts(lm, told, tmp_path / "r")
    assert calls == [0, 1, 2, 2]
    assert (tmp_path / "r" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    write_rollouts(lm, told, tmp_path / "r")
    assert calls == [0, 1, 2, 2]


def test_other_options_are_refused_or_drawn_anew(lm: LanguageModel, tmp_path: Path) -> None:
    place = prompts(tmp_path, "import this")
    write_rollouts(lm, config(place), tmp_path / "r")
    before = rows(tmp_path / "r")
    with pytest.raises(ResumeError, match="holds roll-outs of another model, of other prompts or options"):
        write_rollouts(lm, config(place, seed=1), tmp_path / "r")
    write_rollouts(lm, config(place, seed=1), tmp_path / "r", restart=True)
    assert rows(tmp_path / "r") != before


def test_messages_go_through_the_template(lm: LanguageModel, tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]})
    place = prompts(tmp_path, line, json.dumps({"prompt": "plain"}), name="p.jsonl")
    write_rollouts(lm, config(place, template=TEMPLATE, samples=1), tmp_path / "r")
    chat, plain = rows(tmp_path / "r")
    text = lm.decode(chat["ids"])
    assert text.startswith("<|begin|>system\nBe brief.<|endoftext|>\n<|begin|>user\nHello")
    said = {SPEAKERS[who]: "" for who in set(chat["speakers"])}
    for token, who in zip(chat["ids"], chat["speakers"], strict=True):
        said[SPEAKERS[who]] += lm.decode([token])
    assert (said["system"], said["user"]) == ("Be brief.", "Hello")
    assert said["assistant"] == chat["text"]
    assert plain["prompt"] == 1


def test_what_the_model_thinks_is_thinking(lm: LanguageModel) -> None:
    def who(text: str) -> str:
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = answer_speakers(lm, ids, ("<think>", "</think>"))
        return "".join("T" if SPEAKERS[s] == "thinking" else "a" for s in found)

    assert set(who("no thought at all")) == {"a"}
    assert who("<think>so</think> then").strip("a").strip("T") == ""
    assert who("<think>so</think> then")[-1] == "a"
    assert set(who("<think>never ends")) == {"T"}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("p.csv", "a,b", r"expected a \.txt or \.jsonl file, found \.csv"),
        ("p.jsonl", "{", r"p\.jsonl:1: not JSON"),
        ("p.jsonl", '{"text": "x"}', r"p\.jsonl:1: expected an object with prompt \(text\) or messages"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "no chat template; give one"),
    ],
)
def test_bad_prompts_are_named(lm: LanguageModel, tmp_path: Path, name: str, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_rollouts(lm, config(prompts(tmp_path, line, name=name)), tmp_path / "r")


def test_a_prompt_that_leaves_no_room_is_said_before_anything_is_drawn(lm: LanguageModel, tmp_path: Path) -> None:
    place = prompts(tmp_path, "import this " * 10)
    with pytest.raises(ModelError, match=r"takes at most 64; say fewer --new-tokens"):
        write_rollouts(lm, config(place, new_tokens=60), tmp_path / "r")
