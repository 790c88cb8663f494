"""JSON Lines: `.jsonl`, also `.gz`; one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from unmix.core.errors import DataError
from unmix.data.config import DataConfig
from unmix.data.sources.base import Document, Source, record_document
from unmix.data.sources.lines import check_text, data_suffix, read_lines


class JsonLines(Source):
    """One document a line, from `config.column`; blank lines and null or blank texts are passed over."""

    holds_ids = True

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.path = Path(config.source).expanduser()
        check_text(self.path)
        next(self.documents(), None)

    @classmethod
    def claims(cls, source: str) -> bool:
        return data_suffix(source) == ".jsonl" and not Path(source).expanduser().is_dir()

    def documents(self) -> Iterator[Document]:
        for number, line in read_lines(self.path):
            if not line.strip():
                continue
            where = f"{self.path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected an object, found {type(record).__name__}")
            document = record_document(record, self.config, where, f"{self.path.name}:{number}")
            if document is not None:
                yield replace(document, text=_whole_characters(document.text))

    def report(self) -> dict[str, Any]:
        return {"kind": "jsonl", "path": self.path.name, "column": self.config.column}


def _whole_characters(text: str) -> str:
    """`text` without lone surrogates, which JSON can escape but UTF-8 and tokenizers cannot hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
