"""What every text source is: it claims a name, checks itself, yields documents, and reports what it read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unmix.core.errors import DataError
from unmix.data.config import DataConfig


@dataclass(frozen=True)
class Document:
    """One text with its origin. `label` is free: a title, a package, a class folder."""

    text: str
    source: str
    label: str | None = None


class Source(ABC):
    """One kind of text. Building it checks that the text is there and readable (`DataError`), before any work."""

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


def record_document(record: Mapping[str, Any], config: DataConfig, where: str) -> Document | None:
    """The document of one row; `None` where its text is null or blank.

    Raises `DataError` naming `where`, where the column is missing (with the columns found) or holds no string.
    """
    for column in (config.column, config.label_column):
        if column is not None and column not in record:
            raise missing_column(where, column, list(record))
    text = record[config.column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"{where}: column {config.column!r} holds {type(text).__name__}, expected a string")
    if not text.strip():
        return None
    label = record[config.label_column] if config.label_column is not None else None
    return Document(text, where, None if label is None else str(label))


def missing_column(where: str, column: str, found: list[str]) -> DataError:
    """The error for a column that is not there; it lists those that are."""
    return DataError(f"{where}: no column {column!r}; found {', '.join(found) or 'no columns'}")
