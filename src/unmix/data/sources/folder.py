"""Folders of text, JSONL and Parquet files: recursive, in the order of their paths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from unmix.core.errors import DataError
from unmix.data.config import ChatConfig, DataConfig
from unmix.data.sources.base import Document, Source
from unmix.data.sources.id_array import IdArray
from unmix.data.sources.jsonl import JsonLines
from unmix.data.sources.lines import check_file, data_suffix
from unmix.data.sources.parquet import Parquet
from unmix.data.sources.text import TextFile

TEXT_KINDS: tuple[type[Source], ...] = (TextFile, JsonLines, Parquet)
CHAT_KINDS: tuple[type[Source], ...] = (JsonLines, Parquet)
IDS_KINDS: tuple[type[Source], ...] = (JsonLines, Parquet, IdArray)


class Folder(Source):
    """Every readable file below a folder. Hidden files are passed over; files of other kinds are counted.

    A document's label is its own, else the folder it lies in (relative to the top), so that a folder per class
    keeps its classes. Of token ids, text files (a data set's card, say) are files of another kind.
    """

    holds_ids = True

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.path = Path(config.source).expanduser()
        found = _files_below(self.path)
        self._kinds = TEXT_KINDS if config.tokenised is None else IDS_KINDS
        if isinstance(config, ChatConfig):
            self._kinds = CHAT_KINDS
        self.files = [path for path in found if self._kind_of(path) is not None]
        self.ignored = Counter(data_suffix(path) or "(none)" for path in found if self._kind_of(path) is None)
        if not self.files:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.ignored.items()))
            held = "text" if config.tokenised is None else "token ids"
            expected = ".txt, .md, .rst, .jsonl or .parquet" if held == "text" else ".jsonl, .parquet or .npy"
            if isinstance(config, ChatConfig):
                held, expected = "chats", ".jsonl or .parquet"
            raise DataError(f"{self.path}: no {held} in this folder; found {kinds or 'no files'}, expected {expected}")
        for file in self.files:
            check_file(file)

    @classmethod
    def claims(cls, source: str) -> bool:
        return Path(source).expanduser().is_dir()

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            kind = self._kind_of(file)
            assert kind is not None
            inner = kind(self.config.model_copy(update={"source": str(file)}))
            folder = file.relative_to(self.path).parent.as_posix()
            for document in inner.documents():
                source = document.source if folder == "." else f"{folder}/{document.source}"
                label = document.label if document.label is not None else (None if folder == "." else folder)
                yield replace(document, source=source, label=label)

    def report(self) -> dict[str, Any]:
        return {
            "kind": "folder",
            "path": self.path.name,
            "files": len(self.files),
            "ignored": dict(sorted(self.ignored.items())),
        }

    def _kind_of(self, path: Path) -> type[Source] | None:
        return next((kind for kind in self._kinds if kind.claims(str(path))), None)


def _files_below(top: Path) -> list[Path]:
    """Every file below `top` that is not hidden, by its path's parts."""
    found: list[Path] = []
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.extend(Path(folder) / name for name in names if not name.startswith("."))
    return sorted(found, key=lambda path: path.relative_to(top).parts)
