"""Choosing a few of a latent's windows: which, in what order, and what counts as the same text."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64, Integer

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.store import TokenStore
from unmix.index.windows import Peaks

Kind = Literal["quantiles", "top", "random", "importance"]
KINDS: tuple[Kind, ...] = ("quantiles", "top", "random", "importance")
Dedupe = bool | str
"""True: no two windows with the same tokens; "near": nor with mostly the same; False: no such rule."""
QUANTILES = 10
NEAR = 0.5
"""Share of neighbouring token pairs (of all that two windows hold) above which they are near-duplicates."""


class Chosen:
    """What was taken so far: it refuses a window that shares a position or, by `dedupe`, its text with one of those."""

    def __init__(self, store: TokenStore, dedupe: Dedupe = True) -> None:
        if dedupe not in (True, False, "near"):
            raise ConfigError(f'dedupe is {dedupe!r}, expected True, False or "near"')
        self._tokens = store.tokens.reshape(-1)
        self._context = store.context
        self._spans: dict[int, list[tuple[int, int]]] = {}
        self._seen: set[bytes] | None = set() if dedupe else None
        self._pairs: list[frozenset[tuple[int, int]]] | None = [] if dedupe == "near" else None

    def offer(self, start: int, end: int) -> bool:
        """Take the window `[start, end)` (global) if it may be taken."""
        spans = self._spans.get(start // self._context)
        if spans is not None and any(start < other_end and other_start < end for other_start, other_end in spans):
            return False
        if self._seen is not None and not self._new_text(self._tokens[start:end], self._seen):
            return False
        self._spans.setdefault(start // self._context, []).append((start, end))
        return True

    def _new_text(self, tokens: np.ndarray, seen: set[bytes]) -> bool:
        text = tokens.tobytes()
        if text in seen:
            return False
        if self._pairs is not None:
            ids = tokens.tolist()
            pairs = frozenset(pairwise(ids))
            if any(len(pairs & other) > NEAR * len(pairs | other) for other in self._pairs):
                return False
            self._pairs.append(pairs)
        seen.add(text)
        return True


def choose_in_order(peaks: Peaks, order: Integer[np.ndarray, " m"] | None, n: int, chosen: Chosen) -> list[int]:
    """The first `n` peaks of `order` (None: of all, strongest first) whose windows may be taken."""
    taken: list[int] = []
    total = len(peaks) if order is None else len(order)
    done, size = 0, max(4 * n, 64)
    while done < total and len(taken) < n:
        # In runs: a dense latent has many more peaks than are ever looked at.
        run = np.arange(done, min(done + size, total)) if order is None else order[done : done + size]
        done += len(run)
        starts, ends = peaks.starts[run].tolist(), peaks.ends[run].tolist()
        for i, start, end in zip(run.tolist(), starts, ends, strict=True):
            if chosen.offer(start, end):
                taken.append(i)
                if len(taken) >= n:
                    break
    return taken


def tenths(n: int) -> Int64[np.ndarray, " n"]:
    """Tenth (0 weakest to 9) of each of `n` peaks that stand strongest first."""
    return (n - 1 - np.arange(n)) * QUANTILES // max(n, 1)


def choose_by_quantile(peaks: Peaks, n: int, seed: int, chosen: Chosen) -> list[int]:
    """`n` peaks, evenly over the ten tenths of the peaks by strength, at random inside each.

    What a tenth cannot give (too few peaks, or all overlapping) is made up at random from the others.
    """
    rng = np.random.default_rng(seed)
    # Peaks stand strongest first, so a tenth is a run of them.
    bounds = np.searchsorted(-tenths(len(peaks)), -np.arange(QUANTILES), side="left").tolist()
    ends = [len(peaks), *bounds[:-1]]
    taken: list[int] = []
    for q in reversed(range(QUANTILES)):
        quota = (q + 1) * n // QUANTILES - q * n // QUANTILES
        order = bounds[q] + rng.permutation(ends[q] - bounds[q])
        taken += choose_in_order(peaks, order, quota, chosen)
    if len(taken) < n:
        rest = rng.permutation(np.setdiff1d(np.arange(len(peaks)), taken))
        taken += choose_in_order(peaks, rest, n - len(taken), chosen)
    return sorted(taken)


def by_importance(strength: Float32[np.ndarray, " n"], seed: int) -> Int64[np.ndarray, " n"]:
    """An order drawn without replacement, each next one with probability proportional to its strength.

    Exponential clocks that run at the speed of the strength, in the order in which they ring: the same law as
    drawing one after another (Efraimidis and Spirakis 2006).
    """
    clocks = np.random.default_rng(seed).exponential(size=len(strength))
    return np.argsort(clocks / strength.astype(np.float64), kind="stable")


def choose(peaks: Peaks, kind: str, n: int, seed: int, chosen: Chosen) -> list[int]:
    """Places of `n` peaks (fewer where there are fewer), strongest first."""
    if kind == "top":
        return choose_in_order(peaks, None, n, chosen)
    if kind == "quantiles":
        return choose_by_quantile(peaks, n, seed, chosen)
    if kind == "importance":
        return sorted(choose_in_order(peaks, by_importance(peaks.strength, seed), n, chosen))
    order = np.random.default_rng(seed).permutation(len(peaks))
    return sorted(choose_in_order(peaks, order, n, chosen))


def shuffled(seed: int, size: int, first: int, last: int) -> Int64[np.ndarray, " n"]:
    """Entries `first` to `last` (clipped to `size`) of a keyed permutation of `range(size)`; no other is computed.

    A Feistel network of four rounds over the next power of four, walked until the number is in range.
    """
    at = np.arange(first, min(last, size), dtype=np.uint64)
    half = np.uint64(max((max(size, 2) - 1).bit_length() + 1, 2) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(1, 2**63, (4, 2), dtype=np.uint64) | np.uint64(1)
    todo = np.arange(len(at))
    while len(todo):
        left, right = at[todo] >> half, at[todo] & low
        for add, times in keys:
            mixed = (right + add) * times
            left, right = right, left ^ ((mixed ^ mixed >> np.uint64(29)) * times >> np.uint64(40) & low)
        at[todo] = left << half | right
        todo = todo[at[todo] >= size]
    return at.astype(np.int64)


def check_draw(kind: str, kinds: tuple[str, ...], n: int) -> None:
    """`ConfigError` for a kind of windows that does not exist, or for less than none of them."""
    if kind not in kinds:
        raise ConfigError(f"unknown kind of windows {kind!r}. {did_you_mean(kind, kinds)}")
    if n < 0:
        raise ConfigError(f"n is {n}, expected 0 or more")
