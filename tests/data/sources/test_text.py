from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from unmix.core.errors import DataError
from unmix.data.config import DataConfig
from unmix.data.corpora import find_source, open_corpus
from unmix.data.sources.text import PART_CHARACTERS

# Without the time that gzip writes into its header: it would be part of the test's name.
CUT_SHORT = gzip.compress(b"x" * 9, mtime=0)[:-6]


def texts(path: Path) -> list[tuple[str, str]]:
    return [(d.text, d.source) for d in open_corpus(DataConfig(source=str(path)))]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "A.TXT", "a.txt.gz"])
def test_a_short_file_is_one_document(tmp_path: Path, name: str) -> None:
    raw = "\ufeffGrüße,\r\nzwei Zeilen.\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert texts(tmp_path / name) == [("Grüße,\nzwei Zeilen.", f"{name}:1")]


def test_end_of_text_ends_a_document_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two\n<|endoftext|>\n\nthree<|endoftext|>")
    assert [text for text, _ in texts(path)] == ["one", "two", "three"]


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 200 for i in range(60)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    parts = texts(path)
    assert len(parts) > 5
    assert all(len(text) < PART_CHARACTERS + 1100 for text, _ in parts)
    assert "\n\n".join(text for text, _ in parts).split() == " ".join(paragraphs).split()
    assert all(text.startswith("Paragraph") for text, _ in parts)
    assert parts[1][1].startswith("book.txt:")


def test_a_text_without_blank_lines_is_cut_at_a_line_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("a line without end\n" * 5000)
    parts = texts(path)
    assert len(parts) == 3
    assert sum(text.count("line") for text, _ in parts) == 5000


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n\n", "a.txt: the file holds no text"),
        ("a.txt", b"good\0bad", "a.txt: a binary file (NUL at byte 4), expected UTF-8 text"),
        ("a.txt", b"caf\xe9 au lait", "a.txt: not UTF-8 text (byte 0xe9 at 3)"),
        ("a.txt.gz", b"not gzip at all", "a.txt.gz: not a whole gzip file (Not a gzipped file (b'no'))"),
        ("a.txt.gz", CUT_SHORT, "a.txt.gz: not a whole gzip file (Compressed file ended before"),
        ("a.csv", b"a,b", "a.csv: unknown suffix '.csv'; expected a .txt, .md, .rst, .jsonl (each also .gz)"),
        ("noend", b"a,b", "noend: unknown suffix ''; expected a .txt"),
    ],
)
def test_a_file_that_cannot_be_read_says_why_at_once(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        open_corpus(DataConfig(source=str(path)))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_corpus(DataConfig(source=str(tmp_path / "none.txt")))
    assert str(caught.value) == f"{tmp_path}/none.txt: no such file"


def test_a_bare_name_is_told_how_data_sets_are_written() -> None:
    with pytest.raises(
        DataError, match=r"^wikitext: no such file or folder; expected .* hf:NAME or builtin:python-docs$"
    ):
        open_corpus(DataConfig(source="wikitext"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [(b"\xff\n", "not UTF-8 text (byte 0xff at 0 of the line)"), (b"a\0\n", "a NUL byte, expected UTF-8 text")],
)
def test_bad_bytes_far_down_name_their_line(tmp_path: Path, bad: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 20_000 + bad)
    documents = open_corpus(DataConfig(source=str(path)))
    with pytest.raises(DataError) as caught:
        list(documents)
    assert str(caught.value) == f"{path}:20001: {message}"


def test_a_gzip_that_breaks_off_far_down_is_an_error(tmp_path: Path) -> None:
    import random

    path = tmp_path / "a.txt.gz"
    text = "".join(random.choices("abcdefgh \n", k=400_000)).encode()
    path.write_bytes(gzip.compress(text)[:-5000])
    documents = open_corpus(DataConfig(source=str(path)))
    with pytest.raises(DataError, match=r"a\.txt\.gz: not a whole gzip file"):
        list(documents)


def test_the_report_names_the_kind_and_no_machine_path(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")
    assert find_source(DataConfig(source=str(path))).report() == {
        "kind": "text",
        "path": "a.txt",
        "part_characters": PART_CHARACTERS,
    }
