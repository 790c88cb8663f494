"""How many unmasked positions and documents each role and slice has: what rates are taken over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64

from unmix.index.statistics import PLACE_BINS, partitions
from unmix.index.store import TokenStore

SWEEP = 2**20
"""Positions looked at in one go."""
TABLE = 2**24
"""Numbers in the largest table of documents by value; more of them are searched for."""

Contexts = tuple[Bool[np.ndarray, "n context"], Int64[np.ndarray, " m"], Mapping[str, np.ndarray]]
"""Mask of some contexts; of the unmasked positions the documents, and the number of the value of each partition."""


@dataclass(frozen=True)
class Extent:
    """Unmasked positions of each document and value of one partition: every pair that has any, in order."""

    documents: Int64[np.ndarray, " n"]
    values: Int64[np.ndarray, " n"]
    positions: Int64[np.ndarray, " n"]
    width: int

    def table(self) -> Int64[np.ndarray, "values 3"]:
        """By value: unmasked positions, documents, and the sum over documents of the square of their positions."""
        weights = (self.positions, np.ones_like(self.positions), self.positions**2)
        return np.stack([np.bincount(self.values, w, self.width) for w in weights], axis=1).astype(np.int64)

    @cached_property
    def _keys(self) -> Int64[np.ndarray, " n"]:
        return self.documents * self.width + self.values

    @cached_property
    def _table(self) -> np.ndarray | None:
        size = int(self._keys[-1]) + 1 if len(self._keys) else 0
        if size > TABLE:
            return None
        table = np.zeros(size, np.int64)
        table[self._keys] = self.positions
        return table

    def of(self, documents: Int64[np.ndarray, " m"], values: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Unmasked positions of some documents and values, each of which has any."""
        keys = documents * self.width + values
        if self._table is not None:
            return self._table[keys]
        return self.positions[np.searchsorted(self._keys, keys)]


@dataclass(frozen=True)
class Totals:
    """What all latents share."""

    parts: dict[str, Extent]
    """Of each partition."""
    whole: Extent
    """Of all positions, as one value."""
    places: Int64[np.ndarray, " 16"]
    """Unmasked positions by sixteenth of the context."""

    def tables(self) -> dict[str, np.ndarray]:
        """The fields of `statistics/` that say so; the last row of each partition is the whole."""
        whole = self.whole.table()
        found = {f"{name}.totals": np.concatenate([extent.table(), whole]) for name, extent in self.parts.items()}
        return found | {"place_totals": self.places}


def count_totals(store: TokenStore, place_bins: np.ndarray) -> Totals:
    """Read every unmasked position once. Holds 24 bytes for each document and value."""
    sizes = {name: len(values) for name, values in partitions(store.meta).items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
    places = np.zeros(PLACE_BINS, np.int64)
    for mask, documents, numbers in _sweep(store):
        places += np.bincount(place_bins, mask.sum(axis=0), PLACE_BINS).astype(np.int64)
        for name, values in numbers.items():
            found[name].append(_counted(documents << 8 | values, np.ones(len(documents), np.int64)))
    parts = {name: _extent(np.concatenate(found[name], axis=1), 8, sizes[name]) for name in sizes}
    first = next(iter(parts.values()))
    return Totals(parts, _extent(np.stack([first.documents, first.positions]), 0, 1), places)


def _sweep(store: TokenStore) -> Iterator[Contexts]:
    step = max(SWEEP // store.context, 1)
    for first in range(0, store.n_contexts, step):
        last = min(first + step, store.n_contexts)
        mask = store.mask(np.arange(first, last))
        numbers = {"roles": np.broadcast_to(store.role_of[first:last, None], mask.shape)[mask]}
        numbers |= {f"slice-{name}": values[first:last][mask] for name, values in store.slices.items()}
        yield mask, store.documents[first:last][mask].astype(np.int64), numbers


def _counted(keys: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, "2 m"]:
    """Keys and their summed counts, ascending. Neighbours that are equal are joined before anything is sorted."""
    for ordered in (False, True):
        if ordered:
            order = np.argsort(keys, kind="stable")
            keys, counts = keys[order], counts[order]
        if len(keys):
            first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
            keys, counts = keys[first], np.add.reduceat(counts, first)
    return np.stack([keys, counts])


def _extent(pairs: Int64[np.ndarray, "2 n"], shift: int, width: int) -> Extent:
    keys, positions = _counted(pairs[0], pairs[1])
    return Extent(keys >> shift, keys & ((1 << shift) - 1), positions, width)
