"""Windows: which stretches of context show a latent, and how a few of them are chosen.

A firing *peaks* where no other firing in the window around it is stronger (|value|; among equals the first).
The windows of a latent are those around its peaks, so each window's peak is its true maximum. Chosen windows
never share a position, never hold the same tokens twice, and never cross the border of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, Integer

from unmix.core.errors import ConfigError
from unmix.core.seeds import derive
from unmix.index.store import TokenStore

CONTEXT = (16, 15)
"""Positions to the left and right of the peak where nothing else is asked for: windows of 32 tokens."""
QUANTILES = 10


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
    strings: list[str] | None
    """Display string of each token; None where the index holds no vocabulary."""
    peak_at: int = 0
    """Place of `position` inside the window."""
    quantile: int | None = None
    """Tenth of the latent's peaks that the window was drawn from (0 weakest to 9); None where not by quantile."""

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

    def __len__(self) -> int:
        return len(self.positions)


class Chosen:
    """What was taken so far: it refuses a window that shares a position or all its tokens with one of those."""

    def __init__(self, store: TokenStore) -> None:
        self._tokens = store.tokens.reshape(-1)
        self._context = store.context
        self._spans: dict[int, list[tuple[int, int]]] = {}
        self._seen: set[bytes] = set()

    def offer(self, start: int, end: int) -> bool:
        """Take the window `[start, end)` (global) if it may be taken."""
        spans = self._spans.setdefault(start // self._context, [])
        if any(start < other_end and other_start < end for other_start, other_end in spans):
            return False
        tokens = self._tokens[start:end].tobytes()
        if tokens in self._seen:
            return False
        self._seen.add(tokens)
        spans.append((start, end))
        return True


def window_shape(context: tuple[int, int], length: int, centred: bool) -> Shape:
    """The shape of windows with `context=(left, right)`; `ConfigError` for negative sizes."""
    left, right = context
    if left < 0 or right < 0:
        raise ConfigError(f"context is ({left}, {right}), expected two sizes of 0 or more")
    return Shape(left, right, length, centred)


def find_peaks(positions: Int64[np.ndarray, " n"], values: Float32[np.ndarray, " n"], shape: Shape) -> Peaks:
    """The firings that are the strongest of their own window. Costs firings × firings in a window."""
    starts, ends = shape.bounds(positions)
    n = len(positions)
    if not n:
        return Peaks(positions, starts, ends)
    # One integer per firing that orders by strength, then by earliness: |float32| bits rise with the value.
    bits = np.abs(values).view(np.uint32).astype(np.uint64)
    keys = bits << np.uint64(32) | (np.uint64(2**32 - 1) - np.arange(n, dtype=np.uint64))
    ranges = np.empty(2 * n, np.int64)
    ranges[::2], ranges[1::2] = np.searchsorted(positions, starts), np.searchsorted(positions, ends)
    strongest = np.maximum.reduceat(np.append(keys, np.uint64(0)), ranges)[::2]
    peaks = np.flatnonzero(strongest == keys)
    peaks = peaks[np.argsort(keys[peaks])[::-1]]
    return Peaks(positions[peaks], starts[peaks], ends[peaks])


def choose_in_order(peaks: Peaks, order: Integer[np.ndarray, " m"] | range, n: int, chosen: Chosen) -> list[int]:
    """The first `n` peaks of `order` whose windows may be taken."""
    taken: list[int] = []
    for i in order:
        if len(taken) >= n:
            break
        if chosen.offer(int(peaks.starts[i]), int(peaks.ends[i])):
            taken.append(int(i))
    return taken


def tenths(n: int) -> Int64[np.ndarray, " n"]:
    """Tenth (0 weakest to 9) of each of `n` peaks that stand strongest first."""
    return (n - 1 - np.arange(n)) * QUANTILES // max(n, 1)


def choose_by_quantile(peaks: Peaks, n: int, seed: int, chosen: Chosen) -> list[int]:
    """`n` peaks, evenly over the ten tenths of the peaks by strength, at random inside each.

    What a tenth cannot give (too few peaks, or all overlapping) is made up at random from the others.
    """
    rng = np.random.default_rng(seed)
    member, taken = tenths(len(peaks)), list[int]()
    for q in reversed(range(QUANTILES)):
        quota = (q + 1) * n // QUANTILES - q * n // QUANTILES
        order = rng.permutation(np.flatnonzero(member == q))
        taken += choose_in_order(peaks, order, quota, chosen)
    if len(taken) < n:
        rest = rng.permutation(np.setdiff1d(np.arange(len(peaks)), taken))
        taken += choose_in_order(peaks, rest, n - len(taken), chosen)
    return sorted(taken)


def choose(peaks: Peaks, kind: str, n: int, seed: int, store: TokenStore) -> list[int]:
    """Indices of `n` peaks (fewer where there are fewer), strongest first."""
    chosen = Chosen(store)
    if kind == "top":
        return choose_in_order(peaks, range(len(peaks)), n, chosen)
    if kind == "quantiles":
        return choose_by_quantile(peaks, n, seed, chosen)
    order = np.random.default_rng(seed).permutation(len(peaks))
    return sorted(choose_in_order(peaks, order, n, chosen))


def stream(seed: int, kind: str, coder: str, latent: int) -> int:
    """The seed of one draw: its own for every latent, coder and kind."""
    return derive(seed, "windows", kind, coder, latent)
