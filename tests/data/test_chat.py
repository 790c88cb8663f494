"""Who speaks at each token, whatever the chat template does with the words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmix.core.config import build
from unmix.core.errors import CorruptError, DataError
from unmix.data.chat import ChatRenderer, Spoken
from unmix.data.config import SPEAKERS, ChatConfig, ChatSpec, DataConfig
from unmix.data.shards import TokenShards
from unmix.data.tokenise import tokenise

from .chats import CHATML, COUNTED, GENERATED, HEADERS, REASONING, TALK, TURNS, TWICE, chat_tokenizer


def said(tokenizer: Any, spoken: Spoken, speaker: str) -> list[str]:
    """The texts of the runs of tokens that `speaker` says."""
    number, runs, before = SPEAKERS.index(speaker), [], -1
    for place, (token, who) in enumerate(zip(spoken.ids, spoken.speakers, strict=True)):
        if who == number:
            runs = [*runs, [token]] if before != place - 1 else [*runs[:-1], [*runs[-1], token]]
            before = place
    return [str(tokenizer.decode(run)) for run in runs]


def render(folder: Path, template: str, messages: Sequence[dict[str, Any]], **options: Any) -> tuple[Any, Spoken]:
    tokenizer = chat_tokenizer(folder, template)
    return tokenizer, ChatRenderer(tokenizer, ChatSpec()).spoken(list(messages), **options)


@pytest.mark.parametrize(("template", "trims"), [(CHATML, False), (HEADERS, True), (TURNS, True), (GENERATED, False)])
def test_every_shape_of_template_gives_each_speaker_their_own_words(
    tiny_tokenizer_folder: Path, template: str, trims: bool
) -> None:
    tokenizer, spoken = render(tiny_tokenizer_folder, template, TALK)
    for speaker in ("system", "user", "assistant"):
        wanted = [m["content"].strip() if trims else m["content"] for m in TALK if m["role"] == speaker]
        found = said(tokenizer, spoken, speaker)
        if template == GENERATED and speaker == "assistant":
            found = [text.removesuffix("<|im_end|>") for text in found]
        # A token may hold the template's last newline and the words' first blank: it is the speaker's.
        assert [text.removeprefix("\n") for text in found] == wanted
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(spoken.ids) == whole


def test_tokens_are_those_that_transformers_makes(tiny_tokenizer_folder: Path) -> None:
    for template in (CHATML, HEADERS, TURNS):
        tokenizer, spoken = render(tiny_tokenizer_folder, template, TALK)
        assert spoken.ids == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]


def test_the_templates_own_mark_of_what_is_generated_adds_the_end_of_turn(tiny_tokenizer_folder: Path) -> None:
    tokenizer, spoken = render(tiny_tokenizer_folder, GENERATED, TALK)
    assert said(tokenizer, spoken, "assistant") == ["Paris<|im_end|>", "Is that a question?\n<|im_end|>"]
    tokenizer, spoken = render(tiny_tokenizer_folder, CHATML, TALK)
    assert said(tokenizer, spoken, "assistant") == ["Paris", "Is that a question?\n"]


def test_what_comes_between_think_tags_is_thinking_with_its_tags(tiny_tokenizer_folder: Path) -> None:
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"}]
    tokenizer, spoken = render(tiny_tokenizer_folder, CHATML, talk)
    assert said(tokenizer, spoken, "thinking") == ["<think>\nadd\n</think>"]
    assert [text.strip() for text in said(tokenizer, spoken, "assistant")] == ["4"]


def test_thinking_that_the_template_strips_from_earlier_turns_is_nowhere(tiny_tokenizer_folder: Path) -> None:
    talk = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nfirst sum\n</think>\n\n4"},
        {"role": "user", "content": "and 1 more?"},
        {"role": "assistant", "content": "5", "reasoning_content": "second sum"},
    ]
    tokenizer, spoken = render(tiny_tokenizer_folder, REASONING, talk)
    assert said(tokenizer, spoken, "thinking") == ["<think>\nsecond sum\n</think>"]
    assert [text.strip() for text in said(tokenizer, spoken, "assistant")] == ["4", "5"]
    assert "first sum" not in tokenizer.decode(spoken.ids)


def test_tools_are_called_by_the_assistant_and_answer_themselves(tiny_tokenizer_folder: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "user"}}}
    talk = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4"},
    ]
    tokenizer, spoken = render(tiny_tokenizer_folder, REASONING, talk, tools=[{"name": "add"}])
    assert said(tokenizer, spoken, "tool") == ["4"]
    called, answer = said(tokenizer, spoken, "assistant")
    assert called.strip() == '<call>\n{"name": "add", "arguments": {"a": 2, "b": "user"}}\n</call>'
    assert answer == "It is 4"
    assert said(tokenizer, spoken, "system") == []  # the template's own list of tools is nobody's


def test_a_prompt_ends_with_the_opening_of_an_answer(tiny_tokenizer_folder: Path) -> None:
    tokenizer, spoken = render(tiny_tokenizer_folder, CHATML, TALK[:2], prompt=True)
    assert tokenizer.decode(spoken.ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert spoken.speakers[-1] == 0


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (TWICE, TALK, r"chat\.jsonl:3: this chat template cannot be followed: another text of message 1 \(system\)"),
        (COUNTED, TALK, r"chat\.jsonl:3: this chat template cannot be followed"),
        (TURNS, [TALK[1], TALK[1]], r"chat\.jsonl:3: the chat template refuses this conversation: roles must take"),
    ],
)
def test_a_template_that_cannot_be_followed_is_an_error_that_names_the_row(
    tiny_tokenizer_folder: Path, template: str, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        render(tiny_tokenizer_folder, template, messages, where="chat.jsonl:3")


def test_a_tokenizer_without_a_template_says_so(tiny_tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="no chat template; give one: --chat-template FILE"):
        ChatRenderer(chat_tokenizer(tiny_tokenizer_folder), ChatSpec())
    assert ChatRenderer(chat_tokenizer(tiny_tokenizer_folder), ChatSpec(template=CHATML))


def conversations(n: int = 60) -> list[list[dict[str, Any]]]:
    return [
        [
            {"role": "system", "content": f"You are number {i}."},
            {"role": "user", "content": f"What comes after {i} and before {i + 2}?"},
            {"role": "assistant", "content": f"<think>{i} plus one</think>That is {i + 1}."},
        ]
        for i in range(n)
    ]


def config(path: Path, **changes: Any) -> ChatConfig:
    tree = {"source": str(path), "tokens": 960, "context": 16, "roles": {"explain": 0.5, "score": 0.5}}
    return build(ChatConfig, {**tree, "policy": {"bos": "context"}, **changes})


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [json.dumps({"messages": talk, "topic": i % 3}) for i, talk in enumerate(conversations())]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_shards_hold_speakers_beside_the_tokens(chat_file: Path, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tiny_tokenizer_folder, CHATML)
    shards = tokenise(config(chat_file, label_column="topic"), tokenizer, tmp_path / "tokens", progress=False)
    assert shards.spoken
    shards.verify()
    assert isinstance(TokenShards.open(tmp_path / "tokens").config, ChatConfig)
    everything = np.arange(shards.n_contexts)
    tokens, speakers = shards.tokens(everything), shards.speakers(everything)
    assert tokens.shape == speakers.shape and speakers.dtype == np.uint8
    assert (speakers[:, 0] == 0).all() and (tokens[:, 0] == tokenizer.bos_token_id).all()
    text = tokenizer.decode(tokens[speakers == SPEAKERS.index("thinking")].tolist())
    assert "plus one" in text and "number" not in text and "comes" not in text
    assert set(shards.labels()) == {"0", "1", "2"}


def test_speakers_are_cut_as_the_tokens_are_whatever_the_shards(
    chat_file: Path, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer(tiny_tokenizer_folder, CHATML)
    whole = tokenise(config(chat_file), tokenizer, tmp_path / "a", progress=False)
    cut = tokenise(config(chat_file, shard_tokens=64), tokenizer, tmp_path / "b", progress=False)
    ids = np.arange(whole.n_contexts)[::-1]
    assert whole.hash == cut.hash
    np.testing.assert_array_equal(whole.speakers(ids), cut.speakers(ids))


def test_a_bos_before_the_conversation_is_left_to_packing_and_one_of_every_turn_stays(
    chat_file: Path, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Llama's templates begin with BOS once; SmolLM2 calls BOS what begins every turn."""
    plain = chat_tokenizer(tiny_tokenizer_folder, HEADERS)
    shards = tokenise(config(chat_file), plain, tmp_path / "a", progress=False)
    everything = shards.tokens(np.arange(shards.n_contexts))
    assert (everything == plain.bos_token_id).sum() == shards.n_contexts
    turns = chat_tokenizer(tiny_tokenizer_folder, CHATML)
    turns.bos_token = "<|im_start|>"
    shards = tokenise(config(chat_file), turns, tmp_path / "b", progress=False)
    text = turns.decode(shards.tokens(np.arange(shards.n_contexts))[:, 1:].reshape(-1).tolist())
    assert text.count("<|im_start|>system") == text.count("You are number")


def test_a_flipped_byte_of_the_speakers_is_found(chat_file: Path, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    shards = tokenise(config(chat_file), chat_tokenizer(tiny_tokenizer_folder, CHATML), tmp_path / "t", progress=False)
    path = shards.folder / "explain.speaker-00000.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match="speaker-00000"):
        shards.verify()


def test_text_has_no_speakers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words and more words " * 200)
    plain = DataConfig.model_validate(
        {"source": str(tmp_path / "a.txt"), "tokens": 64, "context": 16, "roles": {"explain": 1.0}}
    )
    shards = tokenise(plain, tiny_tokenizer, tmp_path / "t", progress=False)
    assert not shards.spoken
    with pytest.raises(DataError, match="not made from chats"):
        shards.speakers([0])


def test_rows_of_from_and_value_are_read_too(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]} for talk in conversations()
    ]
    path = tmp_path / "share.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = chat_tokenizer(tiny_tokenizer_folder, CHATML)
    with pytest.raises(DataError, match=r"no column 'messages'; found conversations; set data.column: conversations"):
        tokenise(config(path), tokenizer, tmp_path / "t", progress=False)
    found = tokenise(config(path, column="conversations"), tokenizer, tmp_path / "t", progress=False)
    other = tmp_path / "chat.jsonl"
    other.write_text("\n".join(json.dumps({"messages": talk}) for talk in conversations()))
    same = tokenise(config(other), tokenizer, tmp_path / "u", progress=False)
    np.testing.assert_array_equal(found.speakers([0, 1, 2]), same.speakers([0, 1, 2]))
    np.testing.assert_array_equal(found.tokens([0, 1, 2]), same.tokens([0, 1, 2]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, r"bad\.jsonl:1: column 'messages' holds text, expected a list of messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, r"bad\.jsonl:1: message 1: the role is 'wizard'; known:"),
        ({"messages": [{"role": "user"}]}, r"bad\.jsonl:1: message 1 \(user\): has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, r"message 1 \(user\): its content is int, expected text"),
        ({"messages": ["hi"]}, r"message 1: is str, expected an object with role and content"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        tokenise(config(path), chat_tokenizer(tiny_tokenizer_folder, CHATML), tmp_path / "t", progress=False)
    assert not (tmp_path / "t").exists()


def test_a_text_file_holds_no_conversations(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.txt: holds no conversations; expected rows with messages"):
        tokenise(config(tmp_path / "a.txt"), chat_tokenizer(tiny_tokenizer_folder, CHATML), tmp_path / "t")


def test_stored_ids_keep_their_speakers(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stored.jsonl"
    rows = [{"ids": [10 + i, 11, 12, 13], "speakers": [2, 2, 3, 3]} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = {"chat": {"stored": True}, "column": "ids", "tokens": 320}
    shards = tokenise(config(path, **spec), chat_tokenizer(tiny_tokenizer_folder), tmp_path / "t", progress=False)
    first, who = shards.tokens([0])[0], shards.speakers([0])[0]
    assert who[:6].tolist() == [0, 2, 2, 3, 3, 0] and first[2:5].tolist() == [11, 12, 13]
    path.write_text(json.dumps({"ids": [1, 2], "speakers": [9, 9]}))
    with pytest.raises(DataError, match="a speaker is 9; they are numbered 0 to 5"):
        tokenise(config(path, **spec), chat_tokenizer(tiny_tokenizer_folder), tmp_path / "u", progress=False)
    path.write_text(json.dumps({"ids": [1, 99999], "speakers": [1, 1]}))
    with pytest.raises(DataError, match="the id 99999 is not in the model's vocabulary"):
        tokenise(config(path, **spec), chat_tokenizer(tiny_tokenizer_folder), tmp_path / "v", progress=False)


def test_parquet_rows_of_messages(chat_file: Path, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "chat.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk} for talk in conversations()]), path)
    tokenizer = chat_tokenizer(tiny_tokenizer_folder, CHATML)
    a = tokenise(config(path), tokenizer, tmp_path / "a", progress=False)
    b = tokenise(config(chat_file), tokenizer, tmp_path / "b", progress=False)
    np.testing.assert_array_equal(a.tokens([0, 5]), b.tokens([0, 5]))
    np.testing.assert_array_equal(a.speakers([0, 5]), b.speakers([0, 5]))
