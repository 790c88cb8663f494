from __future__ import annotations

import os
from pathlib import Path

import pytest

from unmix.core.errors import DataError
from unmix.data.config import DataConfig
from unmix.data.corpora import find_source, open_corpus


def test_recursive_in_path_order_with_folders_as_labels(tmp_path: Path) -> None:
    for name in ("pos/b.txt", "pos/a.md", "neg/deep/c.txt", "z.txt", ".hidden/h.txt", "pos/.h.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    (tmp_path / "pos/d.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "image.png").write_bytes(b"\0")
    config = DataConfig(source=str(tmp_path))
    found = [(d.source, d.label) for d in open_corpus(config)]
    assert found == [
        ("neg/deep/c.txt:1", "neg/deep"),
        ("pos/a.md:1", "pos"),
        ("pos/b.txt:1", "pos"),
        ("pos/d.jsonl:1", "pos"),
        ("z.txt:1", None),
    ]
    assert find_source(config).report() == {
        "kind": "folder",
        "path": tmp_path.name,
        "files": 5,
        "ignored": {".png": 1},
    }


def test_a_folder_without_text_lists_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\0")
    (tmp_path / "b.png").write_bytes(b"\0")
    (tmp_path / "README").write_text("x")
    with pytest.raises(DataError) as caught:
        open_corpus(DataConfig(source=str(tmp_path)))
    assert str(caught.value) == (
        f"{tmp_path}: no text in this folder; found 1 (none), 2 .png, expected .txt, .md, .rst, .jsonl or .parquet"
    )


def test_an_empty_folder_says_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text in this folder; found no files"):
        open_corpus(DataConfig(source=str(tmp_path)))


def test_a_bad_file_inside_names_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    documents = open_corpus(DataConfig(source=str(tmp_path)))
    with pytest.raises(DataError, match=r"b\.txt: a binary file \(NUL at byte 0\)"):
        list(documents)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_forbidden_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("fine")
    path.chmod(0)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        open_corpus(DataConfig(source=str(tmp_path)))
