"""A runnable explanation: rules that look at a token and at the few before it.

In the spirit of Neuron-to-Graph (Foote et al. 2023, arXiv:2305.19911), which builds a trie of contexts keyed at the
firing token; here each rule is one path of such a trie, with sets of tokens in a slot, slots left free, and more
general slots (case ignored, kind of token) where they hold as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float32, Int64
from pydantic import Field, ValidationError

from unmix.core.config import Config
from unmix.core.errors import DataError
from unmix.explain.grids import DEPTH, Grid
from unmix.explain.words import Level, TokenTable

VERSION = 1


class Slot(Config):
    """What must stand `back` tokens before the token in question: one of `texts`, at a level."""

    back: int = Field(ge=0, lt=DEPTH)
    level: Level
    texts: tuple[str, ...] = Field(min_length=1)
    """Names at that level; the empty text is "before the context"."""


class Rule(Config):
    """All slots hold → the latent is said to fire, with `activation`."""

    slots: tuple[Slot, ...] = Field(min_length=1)
    """The one nearest to the token first; a slot that is not named may hold anything."""
    activation: float
    """Mean activation over the matches, silent ones counted as 0."""
    matches: int
    """How often the rule matched where it was learnt."""
    fired: int
    """At how many of the matches the latent fired."""
    gain: int
    """Firings that no earlier rule covers."""
    mass: float
    """Share of the latent's summed |activation| that this rule is the first to cover."""
    words: tuple[tuple[str, int], ...] = ()
    """Written words around the firing token, with counts: what a reader should be shown for a piece of a word."""

    @property
    def share(self) -> float:
        """Share of the matches at which the latent fired."""
        return self.fired / max(self.matches, 1)


class Pattern(Config):
    """Rules; a token's predicted activation is the strongest of those that match, 0 where none does."""

    version: int = VERSION
    rules: tuple[Rule, ...]

    def predict(self, tokens: Sequence[str]) -> Float32[np.ndarray, " tokens"]:
        """Predicted activation of each token (display strings) of one sequence."""
        return self.run([tokens])[0] if len(tokens) else np.zeros(0, np.float32)

    def run(self, sequences: Sequence[Sequence[str]]) -> Float32[np.ndarray, "sequences tokens"]:
        """The same for sequences of one length."""
        table = TokenTable(sorted({token for tokens in sequences for token in tokens}))
        ids = np.array([[table.find("token", token) for token in tokens] for tokens in sequences], np.int64)
        grid = Grid(table, ids)
        hits, values = self.match(grid)
        laid = np.zeros(grid.size, np.float32)
        laid[hits] = values
        return laid.reshape(grid.n_contexts, grid.width)[:, DEPTH:]

    def match(self, grid: Grid) -> tuple[Int64[np.ndarray, " hits"], Float32[np.ndarray, " hits"]]:
        """Places (ascending) at which it says the latent fires, and with which activation."""
        found = [(rule_places(rule.slots, grid), rule.activation) for rule in self.rules]
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        places = np.concatenate([place for place, _ in found])
        values = np.repeat(np.array([value for _, value in found], np.float32), [len(place) for place, _ in found])
        order = np.lexsort((-np.abs(values), places))
        places, values = places[order], values[order]
        first = np.ones(len(places), bool)
        first[1:] = places[1:] != places[:-1]
        return places[first], values[first]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, tree: Any) -> Pattern:
        """A pattern from `to_json`'s values; `DataError` where they are none, or of another version."""
        version = cast("dict[str, Any]", tree).get("version") if isinstance(tree, dict) else None
        if version != VERSION:
            raise DataError(f"not a pattern that this version runs: version {version!r}, expected {VERSION}")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise DataError(f"not a pattern: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None


def rule_places(slots: Sequence[Slot], grid: Grid) -> Int64[np.ndarray, " n"]:
    """Places that count and at which every slot holds, ascending."""
    wanted = [(slot, _ids(slot, grid)) for slot in slots]
    sizes = [sum(int(grid.totals(slot.back, slot.level)[id]) for id in ids) for slot, ids in wanted]
    start = int(np.argmin(sizes))
    slot, ids = wanted[start]
    if not sizes[start]:
        return np.zeros(0, np.int64)
    places = np.sort(np.concatenate([grid.occurrences(slot.back, slot.level, id) for id in ids]))
    for i, (slot, ids) in enumerate(wanted):
        if i != start:
            places = places[holds(grid, places, slot.back, slot.level, ids)]
    return places


def _ids(slot: Slot, grid: Grid) -> list[int]:
    """Level ids of a slot's texts, as far as the vocabulary has them."""
    found = (grid.table.find(slot.level, text) for text in slot.texts)
    return [id for id in found if id is not None]


def holds(
    grid: Grid, places: Int64[np.ndarray, " n"], back: int, level: Level, ids: Sequence[int]
) -> Bool[np.ndarray, " n"]:
    """Whether one of `ids` stands `back` tokens before each place."""
    there = grid.level(level)[places - back]
    return there == ids[0] if len(ids) == 1 else np.isin(there, ids)
