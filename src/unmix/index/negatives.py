"""Windows in which a latent never fires."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64

from unmix.index.store import TokenStore
from unmix.index.windows import Chosen, Shape

SWEEP = 4096
"""Contexts looked at in one go at most: 4096 × context booleans, a few of them."""


def choose_silent(
    positions: Int64[np.ndarray, " firings"],
    pool: Int64[np.ndarray, " contexts"],
    shape: Shape,
    n: int,
    seed: int,
    store: TokenStore,
) -> list[tuple[int, int, int]]:
    """`n` silent windows as `(anchor, start, end)`, global: the first of each context of a seeded order.

    A second window of a context is taken only when every context of `pool` has been asked. An anchor is an
    unmasked position; fewer than `n` come back only where no more exist.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(pool)
    chosen = Chosen(store)
    found: list[tuple[int, int, int]] = []
    while len(order) and len(found) < n:
        fruitful: list[np.ndarray] = []
        done = 0
        while done < len(order) and len(found) < n:
            size = min(max(2 * (n - len(found)), 16), SWEEP)
            contexts = order[done : done + size]
            done += size
            more = _one_each(positions, contexts, shape, rng, store, chosen, n - len(found))
            found += more
            fruitful.append(np.array([anchor // store.context for anchor, _, _ in more], np.int64))
        order = np.concatenate(fruitful)
    return found


def _one_each(
    positions: Int64[np.ndarray, " firings"],
    contexts: Int64[np.ndarray, " n"],
    shape: Shape,
    rng: np.random.Generator,
    store: TokenStore,
    chosen: Chosen,
    wanted: int,
) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    anchors = np.arange(store.context)
    starts, ends = shape.bounds(anchors)
    silent = silent_anchors(positions, contexts, starts, ends, store)
    lots = rng.random(silent.shape)
    for row, context in enumerate(contexts):
        if len(found) >= wanted:
            break
        base = int(context) * store.context
        candidates = np.flatnonzero(silent[row])
        for anchor in candidates[np.argsort(lots[row, candidates], kind="stable")]:
            start, end = base + int(starts[anchor]), base + int(ends[anchor])
            if chosen.offer(start, end):
                found.append((base + int(anchor), start, end))
                break
    return found


def silent_anchors(
    positions: Int64[np.ndarray, " firings"],
    contexts: Int64[np.ndarray, " n"],
    starts: Int64[np.ndarray, " context"],
    ends: Int64[np.ndarray, " context"],
    store: TokenStore,
) -> Bool[np.ndarray, "n context"]:
    """Which positions of the contexts are unmasked and have no firing in the window around them."""
    fired = np.zeros((len(contexts), store.context + 1), np.int32)
    first = np.searchsorted(positions, contexts * store.context)
    last = np.searchsorted(positions, (contexts + 1) * store.context)
    for row in np.flatnonzero(last > first):
        fired[row, positions[first[row] : last[row]] - contexts[row] * store.context + 1] = 1
    before = np.cumsum(fired, axis=1)
    return (before[:, ends] == before[:, starts]) & store.mask(contexts)
