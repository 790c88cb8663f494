"""Contexts laid out for matching: every level's ids in one flat array, with room before each context.

A slot `back` tokens before a position is read at `place − back`, which never runs into another context: the
`DEPTH` cells before each context hold the id "before the context".
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64, Integer

from unmix.explain.words import Level, TokenTable

DEPTH = 4
"""Slots that a pattern may look at: the token itself and the three before it."""


class Grid:
    """Some contexts of one length. `places` are indices into the flat layout."""

    def __init__(
        self,
        table: TokenTable,
        tokens: Integer[np.ndarray, "contexts length"],
        mask: Bool[np.ndarray, "contexts length"] | None = None,
    ) -> None:
        self.table = table
        self.n_contexts, self.length = tokens.shape
        self.width = self.length + DEPTH
        laid = np.full((self.n_contexts, self.width), table.outside, np.int32)
        laid[:, DEPTH:] = np.where(tokens < table.outside, tokens, table.outside)
        self._laid = laid.reshape(-1)
        counts = np.zeros(laid.shape, bool)
        counts[:, DEPTH:] = True if mask is None else mask
        self.counts = counts.reshape(-1)
        """Which places count: inside a context and not masked."""
        self._levels: dict[Level, np.ndarray] = {}
        self._totals: dict[tuple[int, Level], np.ndarray] = {}
        self._orders: dict[Level, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def size(self) -> int:
        """Length of the flat layout."""
        return len(self._laid)

    @cached_property
    def trials(self) -> int:
        """How many places count."""
        return int(self.counts.sum())

    def places(self, rows: Int64[np.ndarray, " n"], offsets: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Places of positions given as row of the grid and offset in the context."""
        return rows * self.width + DEPTH + offsets

    def level(self, level: Level) -> np.ndarray:
        """Level id at every place, int32 [size]."""
        if level not in self._levels:
            self._levels[level] = self.table.ids(level)[self._laid]
        return self._levels[level]

    def totals(self, back: int, level: Level) -> np.ndarray:
        """For every level id: at how many places that count it stands `back` tokens before, int64 [ids]."""
        if (back, level) not in self._totals:
            there = self.level(level)[np.flatnonzero(self.counts) - back]
            self._totals[back, level] = np.bincount(there, minlength=self.table.size(level))
        return self._totals[back, level]

    def occurrences(self, back: int, level: Level, id: int) -> Int64[np.ndarray, " n"]:
        """Places that count and have level id `id` standing `back` tokens before them, ascending."""
        if level not in self._orders:
            ids = self.level(level)
            starts = np.zeros(self.table.size(level) + 1, np.int64)
            np.cumsum(np.bincount(ids, minlength=self.table.size(level)), out=starts[1:])
            self._orders[level] = (np.argsort(ids, kind="stable"), starts)
        order, starts = self._orders[level]
        places = order[starts[id] : starts[id + 1]] + back
        places = places[places < self.size]
        return places[self.counts[places]]

    def strings_around(self, place: int, left: int, right: int) -> tuple[list[str], list[str], str]:
        """Token strings before, after, and at a place, cut at the borders of its context."""
        start = place // self.width * self.width + DEPTH
        end = start + self.length
        strings = self.table.strings
        before = [strings[i] for i in self._laid[max(place - left, start) : place]]
        after = [strings[i] for i in self._laid[place + 1 : min(place + 1 + right, end)]]
        return before, after, strings[int(self._laid[place])]


def whole_word(grid: Grid, place: int, reach: int = 6) -> str:
    """The written word that the token at `place` is a piece of; the token's own text where it is no letter."""
    before, after, token = grid.strings_around(place, reach, reach)
    word = token
    if token[:1].isalnum():
        while before and before[-1] and before[-1][-1].isalnum():
            word = before.pop() + word
            if not word[0].isalnum():
                break
    if token[-1:].isalnum():
        for piece in after:
            if not piece or not piece[0].isalnum():
                break
            letters = _head(piece)
            word += letters
            if len(letters) < len(piece):
                break
    return word.strip() or token


def _head(text: str) -> str:
    for i, char in enumerate(text):
        if not char.isalnum():
            return text[:i]
    return text


def spread(places: Int64[np.ndarray, " n"], n: int) -> Int64[np.ndarray, " m"]:
    """At most `n` of `places`, evenly."""
    return places if len(places) <= n else places[np.linspace(0, len(places) - 1, n).astype(np.int64)]
