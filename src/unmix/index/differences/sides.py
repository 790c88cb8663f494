"""One side of a comparison: the stored statistics of one coder over a whole index, a role or a slice of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.differences.evidence import Counts
from unmix.index.reader import CoderIndex, LatentIndex

ROLE = "role"
"""The name by which roles are a slicing too: `role=explain`."""


@dataclass(frozen=True)
class Where:
    """One value of one slicing: `speaker=user`, `label=books`, `role=explain`."""

    slicing: str
    value: str
    number: int

    @classmethod
    def parse(cls, text: str, index: LatentIndex) -> Where:
        """Read `NAME=VALUE`; `ConfigError` naming the nearest where the index has no such slicing or value."""
        name, equals, value = text.partition("=")
        known = index.description.slices | {ROLE: index.roles}
        if not equals:
            raise ConfigError(f"slice {text!r}: expected NAME=VALUE with NAME one of {', '.join(known)}")
        if name not in known:
            raise ConfigError(f"{index.folder} has no slicing {name!r}. {did_you_mean(name, known)}")
        if value not in known[name]:
            raise ConfigError(f"slicing {name!r} has no value {value!r}. {did_you_mean(value, known[name])}")
        return cls(name, value, known[name].index(value))

    def __str__(self) -> str:
        return f"{self.slicing}={self.value}"


@dataclass(frozen=True, eq=False)
class Side:
    """One coder over one index, or over the positions of one value of a slicing."""

    name: str
    index: LatentIndex
    coder: CoderIndex
    where: Where | None
    counts: Counts

    def facts(self) -> dict[str, Any]:
        """What it is, as plain values."""
        counts = self.counts
        return {
            "name": self.name, "folder": str(self.index.folder), "hash": self.index.hash, "coder": self.coder.name,
            "slice": None if self.where is None else str(self.where), "tokens": counts.tokens,
            "documents": counts.n_documents, "tokens_a_document": counts.length,
        }  # fmt: skip


def read_side(index: LatentIndex, coder: CoderIndex, where: Where | None, name: str) -> Side:
    """The stored figures of one side; `ConfigError` where nothing counts on it."""
    figures = coder.figures
    found = figures.whole if where is None else figures.in_slice(where.slicing)
    column = 0 if where is None else where.number
    tokens, n_documents = int(found.tokens[column]), int(found.n_documents[column])
    if not tokens or not n_documents:
        what = "the index" if where is None else str(where)
        raise ConfigError(f"{index.folder}: {what} has no position that counts, so there is nothing to compare")
    fields = (found.firings, found.documents, found.sum, found.squares, found.cross)
    columns = (np.asarray(field[:, column]) for field in fields)
    return Side(name, index, coder, where, Counts(tokens, n_documents, int(found.token_squares[column]), *columns))
