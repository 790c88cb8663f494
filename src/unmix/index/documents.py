"""Where each document of an index lies: its stretches of positions, found in one pass over the document ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from unmix.core.errors import ConfigError
from unmix.index.store import TokenStore

DocumentIds = int | Sequence[int] | Int64[np.ndarray, " documents"]
STEP = 2**22
"""Positions looked at in one go."""


@dataclass(frozen=True)
class DocumentTable:
    """Every document id that occurs, ascending, with what is known of it.

    A *stretch* is a run of positions of one document; a document that spans contexts of another one in between, or
    that was cut, has several. `offsets` splits `starts` and `ends` (global) among the documents.
    """

    ids: Int64[np.ndarray, " documents"]
    positions: Int64[np.ndarray, " documents"]
    """Unmasked positions of each document."""
    role: UInt8[np.ndarray, " documents"]
    """Number of the role of the context that each document begins in."""
    offsets: Int64[np.ndarray, " documents_and_one"]
    starts: Int64[np.ndarray, " stretches"]
    ends: Int64[np.ndarray, " stretches"]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"<{len(self)} documents over {int(self.positions.sum())} unmasked positions>"

    def rows(self, documents: DocumentIds) -> Int64[np.ndarray, " n"]:
        """Rows of some documents, ascending; `ConfigError` for an id that no position has."""
        wanted = np.unique(np.atleast_1d(np.asarray(documents, np.int64)))
        rows = np.searchsorted(self.ids, wanted)
        found = (rows < len(self)) & (self.ids[np.minimum(rows, len(self) - 1)] == wanted)
        if not found.all():
            missing = int(wanted[np.argmin(found)])
            span = f"{len(self)} documents, ids {int(self.ids[0])} to {int(self.ids[-1])}"
            raise ConfigError(f"no document {missing} in this index: it holds {span}")
        return rows

    def stretches(self, documents: DocumentIds) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Global `[start, end)` of every stretch of some documents, ascending."""
        rows = self.rows(documents)
        places = ranges(self.offsets[rows], self.offsets[rows + 1])
        order = np.argsort(self.starts[places])
        return self.starts[places][order], self.ends[places][order]


def ranges(starts: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """`arange(start, end)` of every pair, one after another."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def find_documents(store: TokenStore) -> DocumentTable:
    """Read the document ids once, a few million at a time. Memory: one entry a stretch."""
    ids: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    step = max(STEP // store.context, 1)
    for first in range(0, store.n_contexts, step):
        contexts = np.arange(first, min(first + step, store.n_contexts))
        documents = store.documents[first : contexts[-1] + 1].reshape(-1)
        begins = np.concatenate([[0], np.flatnonzero(documents[1:] != documents[:-1]) + 1])
        ids.append(documents[begins].astype(np.int64))
        starts.append(begins + first * store.context)
        counted.append(np.add.reduceat(store.mask(contexts).reshape(-1), begins, dtype=np.int64))
    return _table(np.concatenate(ids), np.concatenate(starts), np.concatenate(counted), store)


def _table(
    ids: Int64[np.ndarray, " n"], starts: Int64[np.ndarray, " n"], counted: Int64[np.ndarray, " n"], store: TokenStore
) -> DocumentTable:
    fresh = np.concatenate([[True], ids[1:] != ids[:-1]])  # a stretch may go on from one step into the next
    counted = np.add.reduceat(counted, np.flatnonzero(fresh))
    ids, starts = ids[fresh], starts[fresh]
    ends = np.append(starts[1:], store.n_contexts * store.context)
    order = np.argsort(ids, kind="stable")
    ids, starts, ends, counted = ids[order], starts[order], ends[order], counted[order]
    first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    return DocumentTable(
        ids[first], np.add.reduceat(counted, first), store.role_of[starts[first] // store.context],
        np.append(first, len(ids)), starts, ends,
    )  # fmt: skip
