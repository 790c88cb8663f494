"""What every text source is: it claims a name, checks itself, yields documents, and reports what it read."""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from unmix.core.errors import DataError
from unmix.data.config import IDS_COLUMN, ChatConfig, DataConfig

IDS_COLUMNS = (IDS_COLUMN, "tokens")
"""Names under which token ids are published."""


class MissingColumnError(DataError):
    """A column is not there; `found` are those that are."""

    def __init__(self, message: str, found: list[str]) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Document:
    """One text with its origin. `label` is free: a title, a package, a class folder."""

    text: str
    source: str
    label: str | None = None
    ids: tuple[int, ...] | None = None
    """Token ids where the source holds those instead of text."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text, or of the ids (each eight bytes, lowest first)."""
        if self.ids is None:
            return hashlib.sha256(self.text.encode()).digest()
        return hashlib.sha256(struct.pack(f"<{len(self.ids)}q", *self.ids)).digest()


class Source(ABC):
    """One kind of text. Building it checks that the text is there and readable (`DataError`), before any work."""

    holds_ids: ClassVar[bool] = False
    """Whether sources of this kind can hold token ids."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def claims(cls, source: str) -> bool:
        """Whether `config.source` is of this kind, judged by its name alone or by what lies at the path."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, in an order that depends on nothing but the text. Raises `DataError` with its place."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What was read so far: its kind and place, and versions where there are any."""


def record_document(record: Mapping[str, Any], config: DataConfig, where: str, source: str) -> Document | None:
    """The document of one row, its origin being `source`; `None` where its text is null or blank, or its ids are none.

    Raises `DataError` naming `where`, where the column is missing (with the columns found) or holds something else.
    """
    if isinstance(config, ChatConfig):
        from unmix.data.chat_rows import chat_document

        return chat_document(record, config, where, source)
    for column in (config.column, config.label_column):
        if column is not None and column not in record:
            raise missing_column(where, column, list(record), config)
    value = record[config.column]
    named = record[config.label_column] if config.label_column is not None else None
    label = None if named is None else str(named)
    if value is None:
        return None
    if config.tokenised is not None:
        ids = _ids(value, config.column, where)
        return Document("", source, label, ids) if ids else None
    if not isinstance(value, str):
        hint = "; data.tokenised takes token ids" if _row(value) else ""
        raise DataError(f"{where}: column {config.column!r} holds {type(value).__name__}, expected a string{hint}")
    return Document(value, source, label) if value.strip() else None


def missing_column(where: str, column: str, found: list[str], config: DataConfig) -> MissingColumnError:
    """The error for a column that is not there; it lists those that are, and says which of them may be meant."""
    hint = ""
    if column == config.column:
        chats = ("messages", "conversations", "conversation", "chat")
        plain = chats if isinstance(config, ChatConfig) else ("text", *IDS_COLUMNS)
        wanted = IDS_COLUMNS if config.tokenised is not None else plain
        meant = next((name for name in wanted if name in found), None)
        if meant in IDS_COLUMNS and config.tokenised is None and not isinstance(config, ChatConfig):
            hint = f"; to read the token ids in {meant!r} set data.tokenised: rows"
            hint += "" if meant == IDS_COLUMN else f" and data.column: {meant}"
        elif meant is not None:
            hint = f"; set data.column: {meant}"
    return MissingColumnError(f"{where}: no column {column!r}; found {', '.join(found) or 'no columns'}{hint}", found)


def _ids(value: Any, column: str, where: str) -> tuple[int, ...]:
    ids = _row(value)
    if ids is None:
        shown = "text" if isinstance(value, str) else type(value).__name__
        raise DataError(f"{where}: column {column!r} holds {shown}, expected a flat list of token ids")
    return ids


def _row(value: Any) -> tuple[int, ...] | None:
    """A flat list (or array) of whole numbers; `None` where it is anything else."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, (list, tuple)):
        return None
    row = tuple(cast("Sequence[Any]", values))
    return row if all(type(item) is int for item in row) else None
