"""Where something fires: one latent's postings, or a set made of several; and a bounded sample of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int64

from unmix.core.seeds import derive
from unmix.index.choosing import shuffled
from unmix.index.documents import ranges
from unmix.index.figures import Figures
from unmix.index.filters import Filter
from unmix.index.store import PostingStore

Positions = Int64[np.ndarray, " _"]
"""Global, ascending."""
Values = Float32[np.ndarray, " _"]
"""One a position."""

SAMPLE = 2**13
"""Firings from which windows are drawn, about, where something fires more often."""
WHOLE = 2**17
"""Up to here all firings are read and those in other contexts left out; above, only the contexts asked for are read."""
FEW = 5
"""Up to so many times the sample all firings are read; above, only those in the sampled contexts are."""
GROUPS = 256
"""Contexts are sampled in groups of neighbours, so long that about so many make up a sample."""


class Firings(Protocol):
    """What windows are drawn from. Positions ascend; a value's size is its strength."""

    @property
    def context(self) -> int:
        """Positions in a context."""
        ...

    def count(self, roles: tuple[int, ...] | None) -> int:
        """Firings in some roles, or in all of them."""
        ...

    def read(self) -> tuple[Positions, Values]:
        """All firings."""
        ...

    def within(self, contexts: Int64[np.ndarray, " contexts"]) -> tuple[Positions, Values]:
        """The firings in some contexts (ids, ascending)."""
        ...

    def strongest(self, at_least: int) -> tuple[Positions, Values, np.float32]:
        """The firings of a strength of `floor` or more, and that floor; at least so many of them, or all."""
        ...


@dataclass(frozen=True)
class LatentFirings:
    """One latent's postings."""

    postings: PostingStore
    figures: Figures
    latent: int

    @property
    def context(self) -> int:
        """Positions in a context."""
        return self.postings.meta.context

    def count(self, roles: tuple[int, ...] | None) -> int:
        """Firings in some roles, from the stored figures."""
        if roles is None:
            return int(self.postings.counts[self.latent])
        return int(self.figures.firings_by_role[self.latent, list(roles)].sum())

    def read(self) -> tuple[Positions, Values]:
        """All of its postings."""
        return self.postings.read(self.latent)

    def within(self, contexts: Int64[np.ndarray, " contexts"]) -> tuple[Positions, Values]:
        """Its postings in some contexts."""
        return self.postings.within(self.latent, contexts)

    def strongest(self, at_least: int) -> tuple[Positions, Values, np.float32]:
        """Its strongest postings."""
        return self.postings.strongest(self.latent, at_least)


def read_contexts(firings: Firings, keep: Filter) -> tuple[Positions, Values]:
    """Every firing in the contexts of a filter."""
    if keep.everywhere:
        return firings.read()
    if keep.documents is not None or firings.count(None) > WHOLE:
        return firings.within(keep.contexts)
    return _only(*firings.read(), keep)


def read_filtered(firings: Firings, keep: Filter) -> tuple[Positions, Values]:
    """Every firing at the positions of a filter."""
    positions, values = read_contexts(firings, keep)
    if keep.documents is None and not keep.where:
        return positions, values
    fits = keep.keeps(positions)
    return positions[fits], values[fits]


def expected(firings: Firings, keep: Filter) -> int:
    """Firings in the contexts of a filter: known for roles, an estimate where only some documents are kept."""
    total = firings.count(keep.roles)
    if keep.documents is None:
        return total
    return total * len(keep.contexts) // max(len(keep.without_positions().contexts), 1)


def sampled(firings: Firings, keep: Filter, seed: int, size: int) -> tuple[Positions, Values, bool]:
    """`(positions, values, whole)`: the firings in the filter's contexts, or in a random part of these contexts.

    Where more than `size` firings are expected, a uniform sample of groups of neighbouring contexts is read instead,
    all firings of each: a cluster sample, so every firing is as likely as every other. It depends on the seed, the
    filter and the number of firings only (never on segments), and a larger `size` contains a smaller one.
    """
    total = expected(firings, keep)
    if total <= size:
        return *read_contexts(firings, keep), True
    n_contexts = keep.store.n_contexts
    width = -(-n_contexts // min(max(GROUPS * total // SAMPLE, 1), n_contexts))
    groups = -(-n_contexts // width)
    taken = np.sort(shuffled(derive(seed, "contexts"), groups, 0, -(-groups * size // total)))
    if firings.count(None) <= FEW * size:
        positions, values = firings.read()
        first, last = np.searchsorted(positions, np.stack([taken, taken + 1]) * (width * firings.context))
        inside = ranges(first, last)
        positions, values = positions[inside], values[inside]
        return *(_only(positions, values, keep) if not keep.everywhere else (positions, values)), False
    contexts = (taken[:, None] * width + np.arange(width)).reshape(-1)
    contexts = contexts[contexts < n_contexts]
    return *firings.within(contexts[keep.keeps_contexts(contexts)]), False


def _only(positions: Positions, values: Values, keep: Filter) -> tuple[Positions, Values]:
    fits = keep.keeps_contexts(positions // keep.store.context)
    return positions[fits], values[fits]
