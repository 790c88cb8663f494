from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from unmix.core.errors import DataError
from unmix.data.config import DataConfig
from unmix.data.corpora import find_source, open_corpus
from unmix.data.sources.base import Document

ROWS = [
    {"title": "A", "text": "first"},
    {"title": None, "text": "second"},
    {"title": "C", "text": None},
    {"title": "D", "text": "  "},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_one_document_a_line_null_and_blank_passed_over(tmp_path: Path, name: str) -> None:
    raw = "\n\n".join(json.dumps(row) for row in ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    config = DataConfig(source=str(tmp_path / name), label_column="title")
    assert list(open_corpus(config)) == [Document("first", f"{name}:1", "A"), Document("second", f"{name}:3", None)]
    assert find_source(config).report() == {"kind": "jsonl", "path": name, "column": "text"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', '{"text": "b"'], "a.jsonl:2: not JSON (Expecting ',' delimiter at column 13)"),
        (['{"text": "a"}', "[1]"], "a.jsonl:2: expected an object, found list"),
        (['{"text": "a"}', '{"text": 3}'], "a.jsonl:2: column 'text' holds int, expected a string"),
        (['{"text": "a"}', '{"body": "b", "id": 1}'], "a.jsonl:2: no column 'text'; found body, id"),
    ],
)
def test_a_bad_line_names_itself(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    documents = open_corpus(DataConfig(source=str(path)))
    with pytest.raises(DataError) as caught:
        list(documents)
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_a_column_that_is_not_there_is_found_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "t", "text": "x"}\n')
    with pytest.raises(DataError) as caught:
        open_corpus(DataConfig(source=str(path), column="body"))
    assert str(caught.value) == f"{path}:1: no column 'body'; found title, text; set data.column: text"
    with pytest.raises(DataError, match="no column 'class'; found title, text"):
        open_corpus(DataConfig(source=str(path), label_column="class"))
