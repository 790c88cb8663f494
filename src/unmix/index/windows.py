"""Windows: which stretches of context show a latent.

A firing *peaks* where no other firing in the window around it is stronger (|value|; among equals the first).
The windows of a latent are those around its peaks, so each window's peak is its true maximum. Chosen windows
never share a position and never cross the border of a context. `choosing.py` chooses, `drawing.py` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer, UInt64

from unmix.core.errors import ConfigError
from unmix.core.seeds import derive
from unmix.index.store import token_strings

CONTEXT = (16, 15)
"""Positions to the left and right of the peak where nothing else is asked for: windows of 32 tokens."""


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of one context, with one latent's activation at each position."""

    tokens: Integer[np.ndarray, " n"]
    values: Float32[np.ndarray, " n"]
    """The latent's activation; 0 where it is silent or the position is masked."""
    document: int
    """Document id at `position`."""
    position: int
    """Global position of the peak; of a negative window: the position that it was drawn around."""
    context_id: int
    start: int
    """Where the window begins inside its context."""
    role: str
    vocab: list[str] | None = field(repr=False)
    """Display string of every token id of the index; None where it holds no vocabulary."""
    peak_at: int = 0
    """Place of `position` inside the window."""
    quantile: int | None = None
    """Tenth of the latent's peaks that the window was drawn from (0 weakest to 9); None where not by quantile."""
    neighbour: int | None = None
    """Of a negative window drawn from a neighbour's firings: that latent."""

    @cached_property
    def strings(self) -> list[str] | None:
        """Display string of each token, looked up when asked for; None where the index holds no vocabulary."""
        return token_strings(self.vocab, self.tokens)

    def __getstate__(self) -> dict[str, Any]:
        # Its own strings travel to another process, the whole vocabulary does not.
        return {**self.__dict__, "strings": self.strings, "vocab": None}

    @property
    def peak(self) -> float:
        """The activation at the peak, sign kept; 0.0 for a negative window."""
        return float(self.values[self.peak_at])


@dataclass(frozen=True)
class Shape:
    """How a window lies around a position: `left` and `right` of it, or the tile of the context that holds it."""

    left: int
    right: int
    context: int
    centred: bool

    def bounds(self, positions: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Global `[start, end)` of the window of each position, clipped to its context."""
        contexts, places = np.divmod(positions, self.context)
        first = contexts * self.context
        if self.centred:
            start, end = places - self.left, places + self.right + 1
        else:
            width = self.left + 1 + self.right
            start = places // width * width
            end = start + width
        return first + np.maximum(start, 0), first + np.minimum(end, self.context)


@dataclass(frozen=True)
class Peaks:
    """Candidate windows, strongest first; among equals the earlier position. `starts` and `ends` are global."""

    positions: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " n"]
    ends: Int64[np.ndarray, " n"]
    strength: Float32[np.ndarray, " n"]
    """|activation| at the peak."""

    def __len__(self) -> int:
        return len(self.positions)

    def where(self, keep: Bool[np.ndarray, " n"]) -> Peaks:
        """Some of them, in the same order."""
        return Peaks(self.positions[keep], self.starts[keep], self.ends[keep], self.strength[keep])


def window_shape(context: tuple[int, int], length: int, centred: bool) -> Shape:
    """The shape of windows with `context=(left, right)`; `ConfigError` for negative sizes."""
    left, right = context
    if left < 0 or right < 0:
        raise ConfigError(f"context is ({left}, {right}), expected two sizes of 0 or more")
    return Shape(left, right, length, centred)


def find_peaks(positions: Int64[np.ndarray, " n"], values: Float32[np.ndarray, " n"], shape: Shape) -> Peaks:
    """The firings that are the strongest of their own window. Costs firings × firings in a window, at most."""
    if not len(positions):
        return Peaks(positions, positions, positions, values)
    # One integer per firing that orders by strength, then by earliness: |float32| bits rise with the value.
    strength = np.abs(values)
    bits = strength.view(np.uint32).astype(np.uint64)
    keys = bits << np.uint64(32) | np.arange(2**32 - 1, 2**32 - 1 - len(positions), -1, dtype=np.uint64)
    maybe = _beat_their_neighbours(positions, keys, shape)
    starts, ends = shape.bounds(positions[maybe])
    ranges = np.empty(2 * len(maybe), np.int64)
    ranges[::2], ranges[1::2] = np.searchsorted(positions, starts), np.searchsorted(positions, ends)
    strongest = np.maximum.reduceat(np.append(keys, np.uint64(0)), ranges)[::2]
    peak = np.flatnonzero(strongest == keys[maybe])
    peak = peak[np.argsort(keys[maybe[peak]])[::-1]]
    return Peaks(positions[maybe[peak]], starts[peak], ends[peak], strength[maybe[peak]])


def _beat_their_neighbours(
    positions: Int64[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], shape: Shape
) -> Int64[np.ndarray, " m"]:
    """Which firings are stronger than the one before and the one after, where these are in their window.

    Only these can be peaks. It costs little and leaves a third of them or less where a latent fires often.
    """
    starts, ends = shape.bounds(positions)
    rises = np.ones(len(positions), bool)
    rises[1:] = (keys[1:] > keys[:-1]) | (positions[:-1] < starts[1:])
    rises[:-1] &= (keys[:-1] > keys[1:]) | (positions[1:] >= ends[:-1])
    return np.flatnonzero(rises)


def stream(seed: int, kind: str, coder: str, latent: int) -> int:
    """The seed of one draw: its own for every latent, coder and kind."""
    return derive(seed, "windows", kind, coder, latent)
