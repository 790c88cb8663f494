"""Hugging Face data sets, streamed: `hf:NAME`, `hf:OWNER/NAME`, each with `/CONFIG`; `hf:./FOLDER` (extra `data`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from unmix.core.errors import DataError, ServiceError, missing_extra
from unmix.data.config import DataConfig
from unmix.data.sources.base import Document, Source, record_document

PREFIX = "hf:"
SAVED = ("dataset_dict.json", "state.json")
"""In a folder that `save_to_disk` left: of several splits, or of one."""


class HubDataset(Source):
    """One document a row. The rows are streamed: only what the token budget takes is downloaded.

    A folder may also be what `save_to_disk` of the library left.
    """

    holds_ids = True

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        if find_spec("datasets") is None:
            raise missing_extra("datasets", "data", f"reading {config.source}")
        self._datasets: Any = import_module("datasets")
        self.name, self.subset, self._rows = self._find()
        first = next(self._records(islice(self._rows, 1)), None)
        if first is None:
            raise DataError(f"{config.source}: the split {config.split!r} has no rows")
        record_document(first, config, f"{config.source}: row 1", "")

    @classmethod
    def claims(cls, source: str) -> bool:
        return source.startswith(PREFIX)

    def documents(self) -> Iterator[Document]:
        for row, record in enumerate(self._records(self._rows), 1):
            where = f"{self.config.source}: row {row}"
            document = record_document(record, self.config, where, f"{self.name}:{row}")
            if document is not None:
                yield document

    def report(self) -> dict[str, Any]:
        return {
            "kind": "hub",
            "name": self.name,
            "config": self.subset,
            "split": self.config.split,
            "column": self.config.column,
            "datasets": getattr(self._datasets, "__version__", None),
        }

    def _find(self) -> tuple[str, str | None, Any]:
        """The first `(name, config, rows)` that exists: `a/b` is owner/name before name/config."""
        problem: Exception | None = None
        for name, subset in readings(self.config.source):
            try:
                return name, subset, self._load(name, subset)
            except FileNotFoundError as error:  # `DatasetNotFoundError` is one
                problem = problem or error
        raise DataError(f"{self.config.source}: no such data set ({problem})") from problem

    def _load(self, name: str, subset: str | None) -> Any:
        try:
            if saved := [kind for kind in SAVED if (Path(name) / kind).is_file()]:
                rows = self._datasets.load_from_disk(name)
                return self._split_of(rows) if saved[0] == SAVED[0] else rows
            return self._datasets.load_dataset(name, subset, split=self.config.split, streaming=True)
        except ValueError as error:  # an unknown split or config: the message lists those that exist
            raise DataError(f"{self.config.source}: {error}") from error
        except FileNotFoundError:
            raise
        except (OSError, httpx.HTTPError) as error:
            raise ServiceError(f"{self.config.source}: cannot be reached ({error})") from error

    def _split_of(self, splits: Any) -> Any:
        if self.config.split not in splits:
            raise DataError(f"{self.config.source}: no split {self.config.split!r}; found {', '.join(splits)}")
        return splits[self.config.split]

    def _records(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except (OSError, httpx.HTTPError) as error:
            raise ServiceError(f"{self.config.source}: the download broke off ({error})") from error


def readings(source: str) -> list[tuple[str, str | None]]:
    """The `(name, config)` pairs that `hf:…` can mean, the likelier first. `DataError` where it is no name."""
    rest = source.removeprefix(PREFIX)
    if rest.startswith((".", "/", "~")):
        return [(str(Path(rest).expanduser()), None)]
    parts = rest.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{source}: not the name of a data set; expected hf:NAME, hf:OWNER/NAME or either with /CONFIG")
    if len(parts) == 1:
        return [(rest, None)]
    if len(parts) == 2:
        return [(rest, None), (parts[0], parts[1])]
    return [("/".join(parts[:2]), parts[2])]
