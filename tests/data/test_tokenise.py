from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmix.core.errors import DataError
from unmix.core.policy import InputPolicy
from unmix.data.config import ROLES, DataConfig
from unmix.data.sources.base import Document
from unmix.data.tokenise import role_of, token_ids, tokenise, tokenizer_hash

Written = Callable[..., DataConfig]
TRAIN = {"train": 1.0}


def texts(n: int, length: int = 40) -> list[str]:
    """Different texts of letters, all of one length."""
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(n)]
    return ["".join(chr(ord("a") + byte % 26) for byte in (digest * 20)[:length]) for digest in digests]


def plain(config: DataConfig, tokenizer: Any, corpus: list[str]) -> dict[str, list[list[int]]]:
    """The plain reference: one flat stream of tokens a role, cut into contexts."""
    policy = config.policy
    bos, separator = tokenizer.bos_token_id, tokenizer.eos_token_id
    streams: dict[str, list[int]] = {role: [] for role in config.budgets()}
    seen: set[str] = set()
    for text in corpus:
        if text in seen:
            continue
        seen.add(text)
        ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
        stream = streams[role_of(hashlib.sha256(text.encode()).digest(), config)]
        stream += ([bos] if policy.bos == "document" else []) + list(ids) + [separator]
    lead = [bos] if policy.bos == "context" else []
    width = config.context - len(lead)
    return {
        role: [
            lead + stream[i * width : (i + 1) * width] for i in range(min(len(stream) // width, config.budgets()[role]))
        ]
        for role, stream in streams.items()
    }


@pytest.mark.parametrize("bos", ["context", "document", "none"])
@pytest.mark.parametrize("shard_tokens", [10, 97, 10_000])
def test_contexts_are_those_of_the_plain_reference(
    written: Written, letters: Any, tmp_path: Path, bos: Any, shard_tokens: int
) -> None:
    corpus = texts(60, 37) + texts(10, 37) + texts(3, 400)[1:]
    config = written(corpus, tokens=2000, context=16, policy=InputPolicy(bos=bos), shard_tokens=shard_tokens)
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    expected = plain(config, letters, corpus)
    assert shards.n_contexts == sum(map(len, expected.values()))
    for role in ROLES:
        assert shards.tokens(shards.contexts_of(role)).tolist() == expected[role]
    assert (
        len(list((tmp_path / "out").glob("train-*.npy")))
        == {10: len(expected["train"]), 97: 13, 10_000: 1}[shard_tokens]
    )


def test_document_ids_keep_the_borders(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(["abcd", "efgh", "ijklmnopq"], tokens=15, context=5, roles=TRAIN)
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    rows = shards.tokens([0, 1, 2])
    # bos a b c d | bos . e f g | bos h . i j  with "." the separator
    assert rows.tolist() == [[0, 3, 4, 5, 6], [0, 1, 7, 8, 9], [0, 10, 1, 11, 12]]
    assert shards.documents([0, 1, 2]).tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 2, 2]]
    assert [shards.document(i)["start"] for i in range(3)] == [0, 7, 13]


def test_a_document_that_starts_a_context_owns_its_bos(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(["abc", "def", "ghi"], tokens=15, context=5, roles=TRAIN)
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    assert shards.documents([0, 1, 2]).tolist() == [[i] * 5 for i in range(3)]


def test_the_bos_of_a_document_belongs_to_it(written: Written, letters: Any, tmp_path: Path) -> None:
    policy = InputPolicy(bos="document")
    config = written(["ab", "cd", "ef"], tokens=12, context=4, roles=TRAIN, policy=policy)
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    assert shards.tokens([0, 1, 2]).tolist() == [[0, 3, 4, 1], [0, 5, 6, 1], [0, 7, 8, 1]]
    assert shards.documents([0, 1, 2]).tolist() == [[i] * 4 for i in range(3)]


def test_budgets_are_met_exactly_and_roles_never_share_a_document(
    written: Written, letters: Any, tmp_path: Path
) -> None:
    config = written(texts(400), tokens=3200, context=16)
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    assert shards.counts == config.budgets()
    assert shards.roles.dtype == np.uint8
    assert np.bincount(shards.roles).tolist() == list(config.budgets().values())
    owners = [set(shards.documents(shards.contexts_of(role)).ravel().tolist()) for role in ROLES]
    assert sum(map(len, owners)) == len(set().union(*owners)) == shards.n_documents
    report = shards.source_report
    assert report["tokens"] == 3200
    assert report["passed_over"] > 0
    assert report["documents"] + report["passed_over"] <= 400


def test_roles_follow_the_hash_of_the_text_and_the_seed() -> None:
    config = DataConfig()
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(4000)]
    found = [role_of(digest, config) for digest in digests]
    for role, share in config.roles.items():
        assert found.count(role) / 4000 == pytest.approx(share, abs=0.03)
    assert found == [role_of(digest, config) for digest in digests]
    other = [role_of(digest, config.model_copy(update={"seed": 1})) for digest in digests]
    assert sum(a == b for a, b in zip(found, other, strict=True)) < 2200
    assert {role_of(digest, DataConfig(roles={"score": 1.0})) for digest in digests[:50]} == {"score"}


def test_the_same_text_again_is_dropped_and_counted(written: Written, letters: Any, tmp_path: Path) -> None:
    once = tokenise(written(texts(20), tokens=5000, context=8, roles=TRAIN), letters, tmp_path / "a", progress=False)
    twice = tokenise(
        written(texts(20) * 2, tokens=5000, context=8, roles=TRAIN), letters, tmp_path / "b", progress=False
    )
    assert once.source_report["duplicates_dropped"] == 0
    assert twice.source_report["duplicates_dropped"] == 20
    assert twice.n_contexts == once.n_contexts
    assert twice.source_report["sha256"] == once.source_report["sha256"]


def test_the_same_call_makes_the_same_bytes(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(texts(50), tokens=1000, context=8)
    for name in ("a", "b"):
        tokenise(config, letters, tmp_path / name, progress=False)
    a, b = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("a", "b"))
    assert a == b
    assert len(a["files"]) > 8


def test_the_hash_knows_text_tokenizer_and_config(written: Written, letters: Any, tmp_path: Path) -> None:
    def made(corpus: list[str], tokenizer: Any = letters, **fields: Any) -> str:
        config = written(corpus, **{"tokens": 400, "context": 8, "roles": TRAIN, **fields})
        return tokenise(config, tokenizer, tmp_path / "out", progress=False).hash

    first = made(texts(50))
    assert made(texts(50)) == first
    assert made(texts(50), shard_tokens=80) == first
    assert made(["x", *texts(50)]) != first
    assert made(texts(50), seed=1) != first
    other = type("Other", (type(letters),), {"get_vocab": lambda self: {"a": 3}})()
    assert made(texts(50), other) != first


def test_a_real_fast_tokenizer_whatever_its_own_settings(tiny_tokenizer: Any, prose: list[str], tmp_path: Path) -> None:
    backend = tiny_tokenizer.backend_tokenizer
    expected = [backend.encode(text, add_special_tokens=False).ids for text in prose[:5]]
    backend.enable_truncation(4)
    backend.enable_padding(length=4096)
    assert token_ids(tiny_tokenizer, prose[:5]) == expected
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(prose))
    shards = tokenise(DataConfig(source=str(tmp_path / "a.txt"), tokens=20_000), tiny_tokenizer, tmp_path / "out")
    assert shards.n_contexts == 20_000 // 128
    assert shards.policy.bos_id == 1
    assert shards.policy.separator_id == 0
    first = shards.documents([0])[0]
    text = tiny_tokenizer.decode(shards.tokens([0])[0][first == 0][1:])
    assert any(text.removesuffix("<|endoftext|>").strip() in document for document in prose)
    assert np.load(tmp_path / "out" / "train-00000.npy").dtype == np.uint16
    assert len(tokenizer_hash(tiny_tokenizer)) == 64


def test_a_large_vocabulary_takes_32_bits(written: Written, letters: Any, tmp_path: Path) -> None:
    letters.vocab_size = 2**16 + 1
    shards = tokenise(written(texts(20), tokens=80, context=8, roles=TRAIN), letters, tmp_path / "out", progress=False)
    assert np.load(tmp_path / "out" / "train-00000.npy").dtype == np.uint32
    assert shards.tokens([0]).dtype == np.int32


def test_too_little_text_says_how_little_and_leaves_nothing(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(["abc", "def"], tokens=12_800)
    with pytest.raises(DataError) as caught:
        tokenise(config, letters, tmp_path / "deep" / "er" / "out", progress=False)
    assert str(caught.value) == (
        f"{config.source}: too little text: 2 documents of 6 characters leave train, evaluate, explain, score without "
        "one context of 128 tokens; give more text, a shorter context or fewer roles"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_no_text_at_all_says_so(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(["", "  "])
    with pytest.raises(DataError, match=r"corpus\.jsonl: no text in any document$"):
        tokenise(config, letters, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_an_error_far_into_the_text_leaves_no_folder(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(texts(300), tokens=100_000, context=8)
    with (tmp_path / "corpus.jsonl").open("a") as handle:
        handle.write("{broken")
    with pytest.raises(DataError, match=r"corpus\.jsonl:301: not JSON"):
        tokenise(config, letters, tmp_path / "new" / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_an_error_leaves_what_was_there_before(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(texts(50), tokens=400, context=8)
    before = tokenise(config, letters, tmp_path / "out", progress=False)
    with pytest.raises(DataError):
        tokenise(written(["abc"], tokens=400, context=8), letters, tmp_path / "out", progress=False)
    after = type(before).open(tmp_path / "out")
    after.verify()
    assert after.hash == before.hash


def test_less_text_than_asked_for_is_logged(
    written: Written, letters: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = tokenise(written(texts(60), tokens=100_000, context=8), letters, tmp_path / "out", progress=False)
    assert f"all of the text gives {shards.n_tokens} of the 100000 tokens asked for" in caplog.text


def test_a_tokenizer_that_gives_ids_beyond_its_vocabulary_is_an_error(
    written: Written, letters: Any, tmp_path: Path
) -> None:
    class Lying(type(letters)):
        def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
            return {"input_ids": [[70_000] * 20 for _ in texts]}

    with pytest.raises(DataError, match=r"the tokenizer gave the id 70000, beyond its own vocabulary size$"):
        tokenise(written(texts(20), tokens=80, context=8, roles=TRAIN), Lying(), tmp_path / "out", progress=False)


def test_sources_and_labels_are_kept(written: Written, letters: Any, tmp_path: Path) -> None:
    config = written(["zażółć gęślą", "second text", "third text"], tokens=24, context=8, roles=TRAIN)
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    entry = shards.document(0)
    digest = hashlib.sha256("zażółć gęślą".encode()).hexdigest()
    assert entry == {"source": "corpus.jsonl:1", "label": "t0", "hash": digest, "start": 0}
    assert shards.document(1)["source"] == "corpus.jsonl:2"


def test_a_text_with_a_lone_surrogate_is_taken(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc \\ud800 d\\ud83d\\ude00"}\n' + "".join(f'{{"text": "{t}"}}\n' for t in texts(5)))
    config = DataConfig(source=str(path), tokens=80, context=16, roles={"train": 1.0})
    shards = tokenise(config, tiny_tokenizer, tmp_path / "out", progress=False)
    first = shards.tokens([0])[0][(shards.documents([0]) == 0)[0]]
    assert tiny_tokenizer.decode(first) == "<|begin|>abc \ufffd d\U0001f600<|endoftext|>"


def test_document_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Document("a", "b").text = "c"  # pyright: ignore[reportAttributeAccessIssue]
