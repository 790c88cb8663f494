"""`unmix index --model … --coder …`: from flags to an index, and every wrong word said before the model runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmix.coder.coder_set import CoderSet
from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.config import build
from unmix.core.policy import InputPolicy
from unmix.index import open_index

Run = Callable[..., tuple[int, str, str]]
WIDTH = 32


@pytest.fixture(scope="module")
def model(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=64, bos_token_id=1, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return str(folder)


def coder(name: str = "mine", **changes: Any) -> SparseCoder:
    tree = {
        "name": name, "d_in": WIDTH, "n_latents": 40, "activation": {"kind": "topk", "k": 4},
        "reads": ("blocks.0.resid_post",), "input_policy": InputPolicy().model_dump(), **changes,
    }  # fmt: skip
    return SparseCoder(build(CoderConfig, tree))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("coders") / "mine"
    coder().save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": words[:300], "topic": "xy"[i % 2]} for i, words in enumerate(prose)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def words(model: str, place: str, text: str, tmp_path: Path) -> dict[str, str]:
    """Flags of an index that takes a second."""
    return {
        "model": model, "coder": place, "data": text, "tokens": "1k", "context": "16", "dtype": "float32",
        "out": str(tmp_path / "run" / "index"),
    }  # fmt: skip


def flags(words: dict[str, str]) -> list[str]:
    return ["index", *(part for key, value in words.items() for part in (f"--{key}", value))]


def test_an_index_is_built_and_summed_up(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    code, out, err = run(*flags(words), "--label-column", "topic")
    assert code == 0, err
    assert out.startswith("992 tokens (930 count) in 62 contexts, ")
    row = next(line for line in out.splitlines() if line.startswith("mine"))
    assert row.split()[1] == "40" and row.split()[3:] == ["4.00", "3,720"]
    assert "cut by label (2 values)" in out
    assert f"look at it: unmix index stats {tmp_path}/run/index" in out
    index = open_index(tmp_path / "run" / "index")
    assert index["mine"].n_latents == 40
    assert index.meta["hook"] == {"mine": "blocks.0.resid_post"}
    assert index.meta["rebuild"]["tokens"] == "../tokens"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["index", "tokens"]


def test_the_same_command_again_finds_everything_done(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    assert run(*flags(words))[0] == 0
    stamp = (tmp_path / "run" / "index" / "manifest.json").stat().st_mtime_ns
    assert run(*flags(words))[0] == 0
    assert (tmp_path / "run" / "index" / "manifest.json").stat().st_mtime_ns == stamp
    code, _, err = run(*flags({**words, "tokens": "800"}))
    assert code == 2 and "tokens was 1000 and is 800. Say --restart" in err
    assert run(*flags({**words, "tokens": "800"}), "--restart")[0] == 0
    assert open_index(tmp_path / "run" / "index").n_tokens == 800


def test_an_index_of_other_inputs_is_not_replaced_unasked(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    at = tmp_path / "run" / "index"
    assert run(*flags(words))[0] == 0
    kept = (at / "manifest.json").read_bytes()
    code, _, err = run(*flags(words), "--batch", "8")
    assert code == 2 and f"--out {at}: holds an index of other inputs: batch changed: 16 → 8. Say --restart" in err
    coder("other").save(tmp_path / "other")
    code, _, err = run(*flags({**words, "coder": str(tmp_path / "other")}))
    assert code == 2 and "holds an index of other inputs: " in err and "Say --restart to replace it" in err
    assert (at / "manifest.json").read_bytes() == kept
    assert run(*flags(words), "--batch", "8", "--shard", "0/1")[0] == 2
    assert run(*flags(words), "--batch", "8", "--restart")[0] == 0
    assert (at / "manifest.json").read_bytes() != kept
    description = json.loads((at / "index.json").read_text())
    del description["meta"]["build"]
    (at / "index.json").write_text(json.dumps(description))
    code, _, err = run(*flags(words))
    assert code == 2 and f"--out {at}: holds an index not made by this command. Say --restart" in err


def test_a_part_says_what_becomes_of_it(run: Run, words: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    from unmix.index import building

    monkeypatch.setattr(building, "build", lambda *_, **__: None)
    code, out, _ = run(*flags(words), "--shard", "0/2")
    at = tmp_path / "run" / "index"
    assert code == 0 and out.startswith("part 0/2 is done, others are missing; ")
    assert f"finishes the index\nparts on machines that share no folder are joined: unmix index merge OUT {at} " in out


def test_several_coders_and_sets_share_one_pass(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    CoderSet({"a": coder("a"), "b": coder("b", reads=("blocks.1.mlp_out",))}).save(tmp_path / "set")
    code, _, err = run(*flags({**words, "coder": f"one={words['coder']}"}), "--coder", str(tmp_path / "set"))
    assert code == 0, err
    assert open_index(tmp_path / "run" / "index").names == ["one", "a", "b"]


def test_tokens_that_were_made_before_are_taken_as_they_are(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    assert run(*flags(words))[0] == 0
    kept = {key: words[key] for key in ("model", "coder", "dtype")}
    again = {**kept, "data": str(tmp_path / "run" / "tokens"), "out": str(tmp_path / "again")}
    code, _, err = run(*flags(again))
    assert code == 0, err
    one, other = (open_index(p) for p in (tmp_path / "run" / "index", tmp_path / "again"))
    assert one.meta["tokens_hash"] == other.meta["tokens_hash"]
    assert (tmp_path / "again" / "mine" / "manifest.json").exists() == (
        tmp_path / "run" / "index" / "mine" / "manifest.json"
    ).exists()
    code, _, err = run(*flags({**again, "context": "8"}))
    assert code == 2 and "--context is said of text, and --data" in err


CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_chats_are_cut_by_speaker(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    talks = [
        [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"<think>a {i}?</think>It is {i}."}]
        for i in range(60)
    ]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    chat = {**words, "data": str(path), "chat-template": str(tmp_path / "chat.jinja")}
    code, out, err = run(*flags(chat), "--chat")
    assert code == 0, err
    assert "cut by speaker (6 values)" in out
    whole = open_index(tmp_path / "run" / "index")
    assert whole.store.slices["speaker"].max() == 4
    code, out, err = run(*flags({**chat, "out": str(tmp_path / "some"), "speakers": "thinking"}), "--chat")
    assert code == 0, err
    some = open_index(tmp_path / "some")
    assert 0 < some.stats["n_counted"] < whole.stats["n_counted"]
    code, _, err = run(*flags({**words, "data": str(path), "out": str(tmp_path / "other")}), "--chat")
    assert code == 2 and "no chat template; give one: --chat-template FILE" in err


def test_roll_outs_are_indexed_as_chats_are(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("import this\ndef f\nclass A\n")
    del words["data"], words["tokens"]
    rolls = {**words, "rollouts": "8", "prompts": str(tmp_path / "p.txt"), "new-tokens": "30"}
    code, out, err = run(*flags(rolls))
    assert code == 0, err
    assert "cut by speaker (6 values)" in out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["index", "index-rollouts", "tokens"]


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"model": None}, [], "--model is missing; unmix index --help"),
        ({"coder": None}, [], "--coder is missing; unmix index --help"),
        ({"out": None}, [], "--out is missing"),
        ({"data": None}, [], "--data is missing (or --rollouts)"),
        ({"tokns": "5"}, [], "unknown option --tokns. Did you mean 'tokens'"),
        ({"tokens": "many"}, [], "tokens: "),
        ({"tokens": "10"}, [], "without one whole context"),
        ({"context": "9999", "tokens": "100k"}, [], "context is 9999; "),
        ({"batch": "0"}, [], "--batch 0: expected at least 1"),
        ({"budget": "lots"}, [], "--budget lots: expected a number of bytes, such as 2GiB"),
        ({"workers": "0"}, [], "--workers 0: expected at least 1"),
        ({"engine": "spark"}, [], "--engine spark: allowed: processes, ray"),
        ({"shard": "4/4"}, [], "--shard 4/4: expected I/N with I from 0 to N - 1, such as 0/4"),
        ({"dtype": "int3"}, [], "dtype is 'int3'; allowed: float32"),
        ({"roles": "explain"}, [], "--roles explain: expected shares such as"),
        ({"roles": "explian=1"}, [], "explian"),
        ({"data": "nowhere.jsonl"}, [], "nowhere.jsonl: no such file"),
        ({"coder": "nowhere"}, [], "nowhere"),
        ({"model": "./nowhere"}, [], "'./nowhere': no such file or folder, and not a model name"),
        ({"column": "body"}, [], "no column 'body'; found text, topic"),
        ({"label-column": "kind"}, [], "no column 'kind'; found text, topic"),
        ({"speakers": "user"}, [], "--speakers belongs to --chat"),
        ({"speakers": "wizard"}, ["--chat"], "no speaker 'wizard'. Allowed: none, system, user"),
        ({"prompts": "x"}, [], "--prompts belongs to --rollouts"),
        ({"rollouts": "2"}, [], "--data and --rollouts: say one of the two"),
        ({"served": "tgi"}, [], "--served tgi: allowed: vllm"),
        ({"hook": "blocks.9.resid_post"}, [], "blocks.9.resid_post"),
        ({"hook": "blocks.0.rsid_post"}, [], "unknown hook 'blocks.0.rsid_post'. Nearest: blocks.0.resid_post"),
        ({"hook": "blocks.0.mlp_act"}, [], "reads 32 values at blocks.0.mlp_act, which is 64 wide"),
        ({}, ["--chat"], "no column 'messages'; found text, topic"),
        ({}, ["stray"], "index takes options alone here, found 'stray'; unmix index --help"),
    ],
)
def test_every_wrong_word_is_one_clear_message(
    run: Run, words: dict[str, str], tmp_path: Path, changes: dict[str, str | None], more: list[str], message: str
) -> None:
    told = {key: value for key, value in {**words, **changes}.items() if value is not None}
    code, out, err = run(*flags(told), *more)
    assert code == 2 and out == "", err
    assert message in err
    assert not (tmp_path / "run" / "tokens").exists() and not (tmp_path / "run" / "index").exists()


def test_a_coder_of_another_model_is_refused(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    made = coder(model={"name": "gpt2", "family": "gpt2", "n_layers": 12, "d_model": WIDTH, "vocab_size": 50257})
    made.save(tmp_path / "foreign")
    code, _, err = run(*flags({**words, "coder": str(tmp_path / "foreign")}))
    assert code == 2 and "was trained on gpt2 (family gpt2)" in err


def test_vllm_that_is_not_installed_is_said(run: Run, words: dict[str, str]) -> None:
    code, _, err = run(*flags(words), "--served", "vllm")
    assert code == 3 and "--served vllm needs the package 'vllm': pip install 'unmix[vllm]'" in err


def test_a_place_that_holds_something_else_is_left_alone(run: Run, words: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run" / "coders").mkdir(parents=True)
    code, _, err = run(*flags({**words, "out": str(tmp_path / "run")}))
    assert code == 2 and f"holds no index; say --out {tmp_path}/run/index" in err


def test_help_lists_every_flag_and_subcommand(run: Run) -> None:
    from unmix.cli._index_build import FLAGS, OPTIONS
    from unmix.cli.index import SUBCOMMANDS

    code, out, _ = run("index", "--help")
    assert code == 0
    assert [name for name in (*OPTIONS, *FLAGS, "coder") if f"--{name}" not in out] == []
    assert [name for name in SUBCOMMANDS if f"\n  {name}" not in out] == []
    assert max(map(len, out.splitlines())) <= 120
    assert run("index")[1] == out


def test_a_subcommand_that_is_almost_one_is_named(run: Run) -> None:
    code, _, err = run("index", "stat", "x")
    assert code == 2 and "stat: no such run file, and no subcommand. Did you mean unmix index stats?" in err
    code, _, err = run("index", "nowhere.yaml")
    assert code == 2 and "nowhere.yaml: no such config file" in err
