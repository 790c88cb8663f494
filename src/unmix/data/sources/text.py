"""Plain text files: `.txt`, `.md`, `.rst`, each also `.gz`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unmix.data.config import DataConfig
from unmix.data.sources.base import Document, Source
from unmix.data.sources.lines import check_text, data_suffix, read_lines

SUFFIXES = (".txt", ".md", ".rst")
BOUNDARY = "<|endoftext|>"
PART_CHARACTERS = 8_000
"""Plain text marks no documents, and a role belongs to a whole document; so a long text is cut at blank lines into
parts of about this length (some 2,000 tokens), and one book can serve all roles."""


class TextFile(Source):
    """One text file. `<|endoftext|>` ends a document; a long document is cut into parts at blank lines."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.path = Path(config.source).expanduser()
        check_text(self.path)

    @classmethod
    def claims(cls, source: str) -> bool:
        return data_suffix(source) in SUFFIXES and not Path(source).expanduser().is_dir()

    def documents(self) -> Iterator[Document]:
        for line, text in _parts(read_lines(self.path)):
            yield Document(text, f"{self.path.name}:{line}")

    def report(self) -> dict[str, Any]:
        return {"kind": "text", "path": self.path.name, "part_characters": PART_CHARACTERS}


def _parts(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """`(first line, text)` of each part: ended by a boundary, or by a blank line once it is long enough."""
    held: list[str] = []
    length, first = 0, 1
    for number, line in lines:
        pieces = line.split(BOUNDARY)
        for index, piece in enumerate(pieces):
            if index > 0:
                yield from _whole(first, held)
                held, length, first = [], 0, number
            held.append(piece)
            length += len(piece)
        blank = not line.strip()
        if (blank and length >= PART_CHARACTERS) or length >= 4 * PART_CHARACTERS:
            yield from _whole(first, held)
            held, length, first = [], 0, number + 1
    yield from _whole(first, held)


def _whole(first: int, held: list[str]) -> Iterator[tuple[int, str]]:
    if text := "".join(held).strip():
        yield first, text
