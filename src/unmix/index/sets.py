"""Set operations between latents: where several fire together, or one without another, or one near another."""

from __future__ import annotations

import html
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64

from unmix.core.errors import ConfigError
from unmix.core.seeds import derive
from unmix.index.documents import ranges
from unmix.index.filters import Documents, Where, make_filter
from unmix.index.fires import Fires
from unmix.index.firings import Positions, Values
from unmix.index.layout import RoleFilter
from unmix.index.shared import SharedStore
from unmix.metrics.windows import window_html

Side = Literal["around", "before", "after"]


@dataclass(frozen=True)
class Overlap:
    """How two sets of positions lie to each other."""

    first: int
    """Positions of the one."""
    second: int
    """Positions of the other."""
    both: int
    counted: int
    """Unmasked positions of the whole index."""

    @property
    def either(self) -> int:
        """Positions of at least one."""
        return self.first + self.second - self.both

    @property
    def jaccard(self) -> float:
        """both / either; 0 where neither fires."""
        return self.both / max(self.either, 1)

    @property
    def first_in_second(self) -> float:
        """Share of the first's positions that are the second's too."""
        return self.both / max(self.first, 1)

    @property
    def second_in_first(self) -> float:
        """Share of the second's positions that are the first's too."""
        return self.both / max(self.second, 1)

    @property
    def lift(self) -> float:
        """`both` over what two independent sets of these sizes would share; 0 where one never fires."""
        return self.both * self.counted / max(self.first * self.second, 1)


@dataclass(frozen=True, eq=False)
class SetFirings:
    """Positions held in memory, with a strength each."""

    store: SharedStore
    positions: Positions
    strength: Values

    @property
    def context(self) -> int:
        """Positions in a context."""
        return self.store.context

    def count(self, roles: tuple[int, ...] | None) -> int:
        """Positions in some roles."""
        if roles is None:
            return len(self.positions)
        return int(np.isin(self.store.role_of[self.positions // self.context], roles).sum())

    def read(self) -> tuple[Positions, Values]:
        """All of them."""
        return self.positions, self.strength

    def within(self, contexts: Int64[np.ndarray, " contexts"]) -> tuple[Positions, Values]:
        """Those in some contexts."""
        bounds = np.searchsorted(self.positions, np.concatenate([contexts, contexts + 1]) * self.context)
        places = ranges(bounds[: len(contexts)], bounds[len(contexts) :])
        return self.positions[places], self.strength[places]

    def strongest(self, at_least: int) -> tuple[Positions, Values, np.float32]:
        """Those of a strength of `floor` or more, and that floor."""
        if len(self.positions) <= at_least:
            return self.positions, self.strength, np.float32(0)
        floor = np.partition(self.strength, -at_least)[-at_least] if at_least else np.float32(np.inf)
        keep = self.strength >= floor
        return self.positions[keep], self.strength[keep], np.float32(floor)


class Combines(Fires):
    """Something that fires and can be combined with another of the same index: `a & b`, `a | b`, `a - b`, `near`."""

    @abstractmethod
    def as_set(self) -> LatentSet:
        """Its positions and values in memory."""

    def __and__(self, other: Combines) -> LatentSet:
        """Positions at which both fire. Strength: the weaker of the two."""
        a, b = _pair(self, other)
        at, i, j = np.intersect1d(a.positions, b.positions, assume_unique=True, return_indices=True)
        values = _side_by_side(a, b, a.values[i], b.values[j])
        return _join(a, b, "&", at, values, np.minimum(a.strength[i], b.strength[j]))

    def __or__(self, other: Combines) -> LatentSet:
        """Positions at which at least one fires. Strength: the stronger of the two."""
        a, b = _pair(self, other)
        at = np.union1d(a.positions, b.positions)
        i, j = np.searchsorted(at, a.positions), np.searchsorted(at, b.positions)
        left = np.zeros((len(at), len(a.operands)), np.float32)
        right, strength = np.zeros((len(at), len(b.operands)), np.float32), np.zeros(len(at), np.float32)
        left[i], right[j], strength[i] = a.values, b.values, a.strength
        strength[j] = np.maximum(strength[j], b.strength)
        return _join(a, b, "|", at, _side_by_side(a, b, left, right), strength)

    def __sub__(self, other: Combines) -> LatentSet:
        """Positions at which this fires and the other does not. Values and strength: this one's."""
        a, b = _pair(self, other)
        return a.only(~np.isin(a.positions, b.positions, assume_unique=True), f"({a.name} - {b.name})")

    def near(self, other: Combines, within: int, side: Side = "around") -> LatentSet:
        """Positions at which this fires and the other does at most `within` tokens away, in the same context.

        `side`: where the other may fire: "before" this one, "after" it, or "around" it (the same position always
        counts). Strength is this one's; the other's value is its strongest in reach.
        """
        if within < 0:
            raise ConfigError(f"within is {within}, expected 0 tokens or more")
        if side not in ("around", "before", "after"):
            raise ConfigError(f'side is {side!r}, expected "around", "before" or "after"')
        a, b = _pair(self, other)
        first = a.positions // a.context * a.context
        starts = np.maximum(a.positions - (0 if side == "after" else within), first)
        ends = np.minimum(a.positions + (0 if side == "before" else within) + 1, first + a.context)
        lo, hi = np.searchsorted(b.positions, starts), np.searchsorted(b.positions, ends)
        keep = hi > lo
        values = _side_by_side(a, b, a.values[keep], _strongest_in(b.values, lo[keep], hi[keep]))
        name = f"({a.name} near {b.name} within {within}{'' if side == 'around' else ' ' + side})"
        return LatentSet(a.shared, name, _operands(a, b), a.positions[keep], values, a.strength[keep])

    def overlap(self, other: Combines) -> Overlap:
        """How many positions they share, over all roles; of two restricted sets, over their own positions."""
        a, b = _pair(self, other)
        both = len(np.intersect1d(a.positions, b.positions, assume_unique=True))
        return Overlap(len(a.positions), len(b.positions), both, sum(a.shared.meta.counted))


class LatentSet(Combines):
    """Positions at which an expression over latents holds, with each latent's value there. Held in memory.

    `values[:, i]` belongs to `operands[i]`, `(coder, latent)`: its activation where its side of the expression holds,
    else 0. `strength` orders windows and is what they show: a latent's |activation| as a share of its maximum.
    """

    def __init__(
        self,
        store: SharedStore,
        name: str,
        operands: tuple[tuple[str, int], ...],
        positions: Positions,
        values: Float32[np.ndarray, "n operands"],
        strength: Values,
    ) -> None:
        super().__init__(store)
        self.shared, self.context = store, store.context
        self.name, self.operands = name, operands
        self.positions, self.values, self.strength = positions, values, strength

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        return f"<latent set {self.name}: {self.count} positions, frequency {self.frequency:.4%}>"

    def _repr_html_(self) -> str:
        """Its five strongest windows, shaded by strength, for notebooks."""
        shown = [
            window_html(w.strings or [f"<{token}>" for token in w.tokens], w.values.tolist(), 1.0, w.peak_at)
            for w in self.top(5)
        ]
        return f"<div><code>{html.escape(repr(self))}</code>{''.join(shown)}</div>"

    @property
    def count(self) -> int:
        """Positions, over all roles unless the set was restricted."""
        return len(self.positions)

    @property
    def frequency(self) -> float:
        """Their share of all unmasked positions."""
        return self.count / max(sum(self._store.meta.counted), 1)

    @property
    def firings(self) -> SetFirings:
        """Where it holds."""
        return SetFirings(self._store, self.positions, self.strength)

    def as_set(self) -> LatentSet:
        """Itself."""
        return self

    def only(self, keep: Bool[np.ndarray, " n"], name: str) -> LatentSet:
        """Some of its positions, under another name."""
        return LatentSet(self._store, name, self.operands, self.positions[keep], self.values[keep], self.strength[keep])

    def restrict(self, role: RoleFilter = None, where: Where = None, documents: Documents = None) -> LatentSet:
        """Its positions in some roles, slices and documents."""
        asked = [part for part in (role, where, documents) if part is not None]
        shown = ", ".join(str(part) for part in asked)
        keep = make_filter(self._store, role, where, documents).keeps(self.positions)
        return self.only(keep, f"{self.name}[{shown}]" if asked else self.name)

    def _stream(self, seed: int, kind: str) -> int:
        return derive(seed, "windows", kind, self.name)


def single(store: SharedStore, coder: str, latent: int, positions: Positions, values: Values, top: float) -> LatentSet:
    """The set of one latent; `top` is its largest |activation|."""
    strength = np.abs(values) / np.float32(top or 1.0)
    return LatentSet(store, f"{coder}:{latent}", ((coder, latent),), positions, values[:, None], strength)


def _pair(one: Combines, other: Combines) -> tuple[LatentSet, LatentSet]:
    a, b = one.as_set(), other.as_set()
    if a.shared is not b.shared and a.shared.folder.resolve() != b.shared.folder.resolve():
        raise ConfigError(
            f"{a.name} is of the index {a.shared.folder} and {b.name} of {b.shared.folder}: positions of two indexes "
            "cannot be compared"
        )
    return a, b


def _operands(a: LatentSet, b: LatentSet) -> tuple[tuple[str, int], ...]:
    return (*a.operands, *[operand for operand in b.operands if operand not in a.operands])


def _side_by_side(
    a: LatentSet, b: LatentSet, left: Float32[np.ndarray, "n a"], right: Float32[np.ndarray, "n b"]
) -> Float32[np.ndarray, "n both"]:
    """Values of the operands of both; of an operand on both sides the left value, or the right where that is 0."""
    columns = [left[:, i] for i in range(left.shape[1])]
    for i, operand in enumerate(b.operands):
        if operand in a.operands:
            at = a.operands.index(operand)
            columns[at] = np.where(columns[at] != 0, columns[at], right[:, i])
        else:
            columns.append(right[:, i])
    return np.stack(columns, axis=1).astype(np.float32)


def _join(
    a: LatentSet, b: LatentSet, sign: str, at: Positions, values: Float32[np.ndarray, "n both"], strength: Values
) -> LatentSet:
    return LatentSet(a.shared, f"({a.name} {sign} {b.name})", _operands(a, b), at, values, strength)


def _strongest_in(
    values: Float32[np.ndarray, "m operands"], lo: Int64[np.ndarray, " n"], hi: Int64[np.ndarray, " n"]
) -> Float32[np.ndarray, "n operands"]:
    """Of each column, the value of the largest size among rows `[lo, hi)` (never empty); sign kept."""
    if not len(lo):
        return np.empty((0, values.shape[1]), np.float32)
    at = np.empty(2 * len(lo), np.int64)
    at[::2], at[1::2] = lo, hi
    padded = np.concatenate([values, np.zeros((1, values.shape[1]), np.float32)])
    high, low = np.maximum.reduceat(padded, at)[::2], np.minimum.reduceat(padded, at)[::2]
    return np.where(high >= -low, high, low).astype(np.float32)
