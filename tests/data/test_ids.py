"""Data sets of token ids: from every kind of source, as stored or packed again, with documents and errors in place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmix.core.errors import DataError
from unmix.core.policy import InputPolicy
from unmix.data.config import DataConfig
from unmix.data.corpora import find_source, open_corpus
from unmix.data.ids import as_document, cut_row
from unmix.data.sources.base import Document
from unmix.data.tokenise import tokenise

TRAIN = {"train": 1.0}
BOS, END = 0, 1
"""Of the tokenizer `letters`, whose vocabulary has 30 ids."""


def rows_of(n: int, length: int, seed: int = 0) -> list[list[int]]:
    """Rows of letters with a separator here and there."""
    found = np.random.default_rng(seed).integers(2, 30, (n, length))
    found[:, length // 3] = END
    return found.tolist()


def write_jsonl(path: Path, rows: list[Any], column: str = "input_ids") -> Path:
    path.write_text("".join(json.dumps({column: row, "n": i}) + "\n" for i, row in enumerate(rows)))
    return path


def config_of(path: Path | str, kind: Any = "rows", **fields: Any) -> DataConfig:
    given: dict[str, Any] = {"tokens": 96, "context": 8, "roles": TRAIN, "policy": InputPolicy(bos="none"), **fields}
    return DataConfig(source=str(path), tokenised=kind, **given)


def test_rows_as_long_as_a_context_are_contexts(letters: Any, tmp_path: Path) -> None:
    rows = rows_of(12, 8)
    shards = tokenise(config_of(write_jsonl(tmp_path / "a.jsonl", rows)), letters, tmp_path / "out", progress=False)
    assert shards.tokens(range(12)).tolist() == rows
    assert shards.source_report["left_over"] == 0
    # A separator ends a document in the middle of each row.
    assert shards.documents([0, 1]).tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 3, 3, 3, 3, 3]]
    assert shards.document(3)["source"] == "a.jsonl:2"
    assert (
        shards.document(2)["hash"] == shards.document(3)["hash"] == Document("", "", None, tuple(rows[1])).digest.hex()
    )


@pytest.mark.parametrize("stored_bos", [True, False])
def test_with_a_bos_every_context_has_one(letters: Any, tmp_path: Path, stored_bos: bool) -> None:
    """Rows of 8 with their own BOS stay what they are; without one the last id makes room."""
    rows = [[BOS, *row[1:]] if stored_bos else row for row in rows_of(12, 8)]
    config = config_of(write_jsonl(tmp_path / "a.jsonl", rows), policy=InputPolicy())
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    expected = rows if stored_bos else [[BOS, *row[:-1]] for row in rows]
    assert shards.tokens(range(12)).tolist() == expected
    assert shards.source_report["left_over"] == (0 if stored_bos else 12)


def test_longer_rows_are_cut_and_what_is_left_is_counted(
    letters: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[BOS, *row[1:]] for row in rows_of(6, 20)]
    config = config_of(write_jsonl(tmp_path / "a.jsonl", rows), policy=InputPolicy())
    shards = tokenise(config, letters, tmp_path / "out", progress=False)
    assert shards.tokens(range(12)).tolist() == [[BOS, *row[at : at + 7]] for row in rows for at in (1, 8)]
    # The document behind the separator at 6 goes on in the second context of a row.
    assert shards.documents([0, 1, 2]).tolist() == [[0] * 7 + [1], [1] * 8, [2] * 7 + [3]]
    assert shards.source_report["left_over"] == 6 * 5
    assert f"{tmp_path}/a.jsonl: 30 ids are left out, since contexts of 8 do not divide its rows" in caplog.text


def test_budgets_roles_and_shards_hold_for_rows(letters: Any, tmp_path: Path) -> None:
    rows = rows_of(300, 24)
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, *rows[:50]])
    shards = tokenise(config_of(path, tokens=1600, roles={"train": 0.75, "score": 0.25}, shard_tokens=100), letters,
                      tmp_path / "out", progress=False)  # fmt: skip
    assert shards.counts == {"train": 150, "score": 50}
    trained = {tuple(row) for row in shards.tokens(shards.contexts_of("train")).tolist()}
    scored = {tuple(row) for row in shards.tokens(shards.contexts_of("score")).tolist()}
    assert not trained & scored
    pieces = {tuple(row[at : at + 8]) for row in rows for at in (0, 8, 16)}
    assert trained | scored <= pieces


@pytest.mark.parametrize("bos", ["context", "document", "none"])
def test_documents_of_ids_are_packed_as_their_text_is(
    letters: Any, tmp_path: Path, written: Callable[..., DataConfig], bos: Any
) -> None:
    """Their own BOS and separators at the ends are those of the policy, not put a second time."""
    texts = ["".join(chr(ord("a") + (i * j) % 26) for j in range(1, 5 + i)) for i in range(1, 40)]
    fields = {"tokens": 400, "context": 16, "roles": TRAIN, "policy": InputPolicy(bos=bos)}
    plain = tokenise(written(texts, **fields), letters, tmp_path / "text", progress=False)
    ids = letters(texts, add_special_tokens=False)["input_ids"]
    lead = [] if bos == "none" else [BOS]
    marked = [[*lead, *row, END] if i % 2 else row for i, row in enumerate(ids)]
    config = config_of(write_jsonl(tmp_path / "ids.jsonl", marked), "documents", **fields)
    shards = tokenise(config, letters, tmp_path / "ids", progress=False)
    assert shards.tokens(range(shards.n_contexts)).tolist() == plain.tokens(range(plain.n_contexts)).tolist()
    assert np.array_equal(shards.documents(range(shards.n_contexts)), plain.documents(range(plain.n_contexts)))


def test_every_kind_of_source_gives_the_same(letters: Any, tmp_path: Path) -> None:
    rows = rows_of(12, 8)
    expected = [tuple(row) for row in rows]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"input_ids": rows, "attention_mask": rows}), tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", np.array(rows, dtype=np.uint16))
    for name in ("a.jsonl", "a.parquet", "a.npy"):
        if name == "a.jsonl":
            write_jsonl(tmp_path / name, rows)
        found = list(open_corpus(config_of(tmp_path / name)))
        assert [document.ids for document in found] == expected, name
        assert (found[4].source, found[4].text, found[4].label) == (f"{name}:5", "", None)
    # A data set's folder: parts in order, the card passed over.
    folder = tmp_path / "set"
    (folder / "part").mkdir(parents=True)
    np.save(folder / "part" / "b.npy", np.array(rows[6:]))
    pq.write_table(pa.table({"input_ids": rows[:6]}), folder / "a.parquet")
    (folder / "README.md").write_text("a card")
    source = find_source(config_of(folder))
    assert [document.ids for document in source.documents()] == expected
    assert source.report()["ignored"] == {".md": 1}
    shards = tokenise(config_of(folder), letters, tmp_path / "out", progress=False)
    assert shards.tokens(range(12)).tolist() == rows
    assert shards.document(12)["label"] == "part"


def test_hub_data_sets_and_what_save_to_disk_left(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = rows_of(5, 8)
    made = datasets.Dataset.from_dict({"tokens": rows})
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "splits")
    made.to_parquet(tmp_path / "hub" / "train.parquet")
    expected = [tuple(row) for row in rows]
    for name in ("one", "splits", "hub"):
        config = config_of(f"hf:{tmp_path / name}", column="tokens")
        assert [document.ids for document in open_corpus(config)] == expected, name
    assert len(list(open_corpus(config_of(f"hf:{tmp_path}/splits", column="tokens", split="test")))) == 1
    with pytest.raises(DataError, match=r"splits: no split 'dev'; found train, test$"):
        open_corpus(config_of(f"hf:{tmp_path}/splits", column="tokens", split="dev"))
    with pytest.raises(DataError, match=r"no column 'input_ids'; found tokens; set data.column: tokens"):
        open_corpus(config_of(f"hf:{tmp_path}/one"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("some text", "column 'input_ids' holds text, expected a flat list of token ids"),
        ([[2, 3], [4, 5]], "column 'input_ids' holds list, expected a flat list of token ids"),
        ([2.0, 3.0], "column 'input_ids' holds list, expected a flat list of token ids"),
        ({"a": 1}, "column 'input_ids' holds dict, expected a flat list of token ids"),
        ([2, True], "column 'input_ids' holds list, expected a flat list of token ids"),
    ],
)
def test_what_is_no_row_of_ids_says_so(tmp_path: Path, row: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError) as caught:
        open_corpus(config_of(path))
    assert str(caught.value) == f"{path}:1: {message}"


def test_missing_columns_name_the_field_to_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(2, 8))
    with pytest.raises(DataError) as caught:
        open_corpus(DataConfig(source=str(path)))
    assert str(caught.value) == (
        f"{path}:1: no column 'text'; found input_ids, n; to read the token ids in 'input_ids' set data.tokenised: rows"
    )
    other = write_jsonl(tmp_path / "b.jsonl", rows_of(2, 8), "tokens")
    with pytest.raises(DataError, match=r"in 'tokens' set data.tokenised: rows and data.column: tokens$"):
        open_corpus(DataConfig(source=str(other)))
    with pytest.raises(DataError, match=r"no column 'input_ids'; found tokens, n; set data.column: tokens$"):
        open_corpus(config_of(other))
    with pytest.raises(DataError, match=r"holds list, expected a string; data.tokenised takes token ids$"):
        list(open_corpus(DataConfig(source=str(path), column="input_ids")))


@pytest.mark.parametrize(("wrong", "allowed"), [(30, "0 to 29"), (-1, "0 to 29"), (70_000, "0 to 29")])
def test_ids_outside_the_vocabulary_name_their_row(letters: Any, tmp_path: Path, wrong: int, allowed: str) -> None:
    rows = rows_of(12, 8)
    rows[7][3] = wrong
    with pytest.raises(DataError) as caught:
        tokenise(config_of(write_jsonl(tmp_path / "a.jsonl", rows)), letters, tmp_path / "out", progress=False)
    assert str(caught.value) == (
        f"a.jsonl:8: the id {wrong} is not in the model's vocabulary ({allowed}); "
        "was this data set made with another model's tokenizer?"
    )
    assert not (tmp_path / "out").exists()


def test_short_rows_are_told_before_any_work(letters: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(12, 6))
    with pytest.raises(DataError) as caught:
        find_source(config_of(path))
    assert str(caught.value) == (
        "a.jsonl:1: 6 ids, too few for one context of 8; give a shorter data.context, "
        "or set data.tokenised: documents to pack rows together"
    )
    # Later ones are passed over, and counted.
    mixed = write_jsonl(tmp_path / "b.jsonl", [*rows_of(3, 8), *rows_of(2, 5), [], *rows_of(3, 8, seed=1)])
    shards = tokenise(config_of(mixed, tokens=48), letters, tmp_path / "out", progress=False)
    assert (shards.n_contexts, shards.source_report["passed_over"]) == (6, 2)
    one = write_jsonl(tmp_path / "c.jsonl", rows_of(1, 8))
    with pytest.raises(DataError, match=r"too little text: 1 documents leave (train|score) without one context of 8"):
        tokenise(config_of(one, roles={"train": 0.5, "score": 0.5}), letters, tmp_path / "few", progress=False)


def test_text_is_no_source_of_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for source in (f"{tmp_path}/a.txt", "builtin:python-docs"):
        with pytest.raises(DataError) as caught:
            find_source(config_of(source))
        assert str(caught.value) == (
            f"{source}: holds text, and data.tokenised needs token ids: a .jsonl, .parquet or .npy file, "
            "a folder of them, or hf:NAME"
        )
    with pytest.raises(DataError, match=r"no token ids in this folder; found 1 \.txt, expected \.jsonl, \.parquet or"):
        find_source(config_of(tmp_path))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(8, np.int64), r"int64 \[8\], expected whole numbers \[rows, ids\]"),
        (np.zeros((2, 8), np.float32), r"float32 \[2, 8\], expected whole numbers"),
        (np.zeros((0, 8), np.int32), r"int32 \[0, 8\], expected whole numbers"),
    ],
)
def test_arrays_that_are_no_rows(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message):
        find_source(config_of(tmp_path / "a.npy"))
    with pytest.raises(DataError, match=r"an array of token ids; set data.tokenised: rows"):
        find_source(DataConfig(source=str(tmp_path / "a.npy")))
    (tmp_path / "b.npy").write_bytes(b"not an array at all")
    with pytest.raises(DataError, match=r"b\.npy: not a readable \.npy file"):
        find_source(config_of(tmp_path / "b.npy"))


def test_the_column_of_ids_has_its_own_default() -> None:
    assert DataConfig(source="x").column == "text"
    assert DataConfig(source="x", tokenised="rows").column == "input_ids"
    assert DataConfig(source="x", tokenised="rows", column="tokens").column == "tokens"
    again = DataConfig.model_validate(DataConfig(source="x", tokenised="rows").model_dump())
    assert again.column == "input_ids"


@pytest.mark.parametrize(
    ("bos", "ids", "expected"),
    [
        ("document", [9, 5, 6, 9, 9, 7], [0, 4]),  # bos a b . bos c
        ("document", [5, 6, 9, 9, 9, 9, 7], [0, 3, 5]),  # a b . | bos . | bos c: an empty document in the middle
        ("none", [9, 5, 9], [0]),
        ("none", [5, 9, 9, 6], [0, 2, 3]),  # without a BOS a second separator ends an empty document
        ("context", [9, 5, 9, 6], [0, 2]),  # behind the BOS, which is not counted: a . b
    ],
)
def test_bos_and_separator_may_be_one_token(bos: Any, ids: list[int], expected: list[int]) -> None:
    """As GPT-2's are."""
    policy = InputPolicy(bos=bos, bos_id=None if bos == "none" else 9, separator_id=9)
    row = cut_row(np.array(ids), policy, len(ids))
    assert row.starts.tolist() == expected
    assert as_document(np.array([9, 5, 6, 9]), policy) == ([9, 5, 6] if bos == "none" else [5, 6])


def test_reading_ids_imports_no_torch(tmp_path: Path) -> None:
    import subprocess

    code = "import sys; from unmix.data import tokenise, open_corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 0


def test_a_language_model_of_ids_needs_a_tokenizer_by_name(tmp_path: Path) -> None:
    """There is no text to train one from."""
    from unmix.core.config import build
    from unmix.core.errors import ConfigError
    from unmix.train.language.config import LanguageConfig

    tree: dict[str, Any] = {"data": {"source": str(tmp_path), "tokenised": "rows"}}
    with pytest.raises(ConfigError, match=r"tokenizer\.name is needed where data\.tokenised says"):
        build(LanguageConfig, tree)
    assert build(LanguageConfig, {**tree, "tokenizer": {"name": "gpt2"}}).data.column == "input_ids"
