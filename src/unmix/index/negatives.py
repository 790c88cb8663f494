"""Windows in which something never fires: at random, where its neighbours fire, or most alike in text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from unmix.index.choosing import Chosen, Dedupe, shuffled
from unmix.index.documents import ranges
from unmix.index.drawing import make_windows
from unmix.index.filters import Filter
from unmix.index.firings import SAMPLE, Firings, sampled
from unmix.index.similar import TILE, Embed, Texts
from unmix.index.store import TokenStore
from unmix.index.windows import Shape, Window, find_peaks

Kind = Literal["random", "neighbours", "similar"]
KINDS: tuple[Kind, ...] = ("random", "neighbours", "similar")
SWEEP = 2**19
"""Positions looked at in one go at most: some 32 bytes each."""
WHOLE = 2**15
"""Up to here all firings are read; above, only those in the contexts that are looked at."""
NEIGHBOURS = 16
"""Neighbours whose firings are drawn from where the caller names none."""

Fired = Callable[[Int64[np.ndarray, " contexts"]], Int64[np.ndarray, " n"]]
"""Contexts (ascending) → positions of the firings there, ascending; it may give those of other contexts too."""


@dataclass(frozen=True)
class Silent:
    """Chosen silent windows, in the order in which they were found."""

    anchors: list[int]
    starts: list[int]
    ends: list[int]

    def windows(self, store: TokenStore, neighbour: Sequence[int] | None = None) -> list[Window]:
        """The windows themselves; every value is 0."""
        nothing = np.empty(0, np.int64), np.empty(0, np.float32)
        anchors, starts, ends = (np.array(x, np.int64) for x in (self.anchors, self.starts, self.ends))
        return make_windows(store, *nothing, anchors, starts, ends, neighbour=neighbour)

    def take(self, anchor: int, start: int, end: int) -> None:
        """One more."""
        self.anchors.append(anchor)
        self.starts.append(start)
        self.ends.append(end)


def firing_in(firings: Firings) -> Fired:
    """All firings, read once where they are few, else those of the contexts asked for."""
    if firings.count(None) > WHOLE:
        return lambda contexts: firings.within(contexts)[0]
    positions = firings.read()[0]
    return lambda contexts: positions


def draw_random(firings: Firings, keep: Filter, shape: Shape, n: int, seed: int, dedupe: Dedupe) -> list[Window]:
    """`n` silent windows: the first of each context of a seeded order.

    A second window of a context is taken only when every context of the filter has been asked. An anchor is an
    unmasked position that the filter keeps; fewer than `n` come back only where no more exist.
    """
    rng = np.random.default_rng(seed)
    chosen, found, fired = Chosen(keep.store, dedupe), Silent([], [], []), firing_in(firings)
    pool = keep.contexts
    order: Int64[np.ndarray, " n"] | None = None
    while len(found.anchors) < n:
        fruitful: list[np.ndarray] = []
        done, total = 0, len(pool) if order is None else len(order)
        while done < total and len(found.anchors) < n:
            # As many as before, at least: where hardly a window is silent, many have to be looked at.
            size = min(max(2 * (n - len(found.anchors)), 16, done), max(SWEEP // shape.context, 1))
            contexts = pool[shuffled(seed, total, done, done + size)] if order is None else order[done : done + size]
            done += size
            before = len(found.anchors)
            _one_each(fired, contexts, keep, shape, rng, chosen, n, found)
            fruitful.append(np.array(found.anchors[before:], np.int64) // shape.context)
        order = np.concatenate(fruitful) if fruitful else np.empty(0, np.int64)
        if not len(order):
            break
    return found.windows(keep.store)


def _one_each(
    fired: Fired,
    contexts: Int64[np.ndarray, " n"],
    keep: Filter,
    shape: Shape,
    rng: np.random.Generator,
    chosen: Chosen,
    wanted: int,
    found: Silent,
) -> None:
    starts, ends = shape.bounds(np.arange(shape.context))
    silent = silent_places(fired(np.sort(contexts)), contexts, starts, ends, keep)
    lots = np.where(silent, rng.random(silent.shape), 2.0)
    first = np.argmin(lots, axis=1)
    for row in np.flatnonzero(silent.any(axis=1)).tolist():
        if len(found.anchors) >= wanted:
            return
        base = int(contexts[row]) * shape.context
        place = int(first[row])
        if chosen.offer(base + int(starts[place]), base + int(ends[place])):
            found.take(base + place, base + int(starts[place]), base + int(ends[place]))
            continue
        for place in np.argsort(lots[row], kind="stable")[1 : int(silent[row].sum())].tolist():
            if chosen.offer(base + int(starts[place]), base + int(ends[place])):
                found.take(base + place, base + int(starts[place]), base + int(ends[place]))
                break


def silent_places(
    positions: Int64[np.ndarray, " firings"],
    contexts: Int64[np.ndarray, " n"],
    starts: Int64[np.ndarray, " context"],
    ends: Int64[np.ndarray, " context"],
    keep: Filter,
) -> Bool[np.ndarray, "n context"]:
    """Which places of the contexts are unmasked, fit the filter, and have no firing in the window around them."""
    size = keep.store.context
    base = contexts * size
    first, last = np.searchsorted(positions, base), np.searchsorted(positions, base + size)
    row = np.repeat(np.arange(len(contexts)), last - first)
    before = np.zeros((len(contexts), size + 1), np.int32)
    before[row, positions[ranges(first, last)] - base[row] + 1] = 1
    np.cumsum(before, axis=1, out=before)
    return (before[:, ends] == before[:, starts]) & keep.keeps_places(contexts)


def draw_neighbours(
    firings: Firings,
    neighbours: Sequence[tuple[int, Firings]],
    keep: Filter,
    shape: Shape,
    n: int,
    seed: int,
    dedupe: Dedupe,
) -> list[Window]:
    """`n` windows around peaks of the neighbours in which `firings` are silent, from each neighbour in turn.

    A neighbour offers its peaks in a seeded order, of a sample where it fires more than 8,000 times. Fewer than
    `n` come back where none of what is offered is silent.
    """
    fired, chosen, found = firing_in(firings), Chosen(keep.store, dedupe), Silent([], [], [])
    offers = [_silent_peaks(fired, other, keep, shape, seed + 1 + i, 4 * n) for i, (_, other) in enumerate(neighbours)]
    drawn_from: list[int] = []
    turn = list(range(len(neighbours)))
    while turn and len(found.anchors) < n:
        for i in list(turn):
            for anchor, start, end in offers[i]:
                if chosen.offer(start, end):
                    found.take(anchor, start, end)
                    drawn_from.append(neighbours[i][0])
                    break
            else:
                turn.remove(i)
            if len(found.anchors) >= n:
                break
    return found.windows(keep.store, drawn_from)


def _silent_peaks(
    fired: Fired, other: Firings, keep: Filter, shape: Shape, seed: int, size: int
) -> Iterator[tuple[int, int, int]]:
    """Peaks of another one, in a seeded order, whose window holds none of the firings; read a few at a time."""
    positions, values, _ = sampled(other, keep, seed, SAMPLE)
    peaks = find_peaks(positions, values, shape)
    if keep.where or keep.documents is not None:
        peaks = peaks.where(keep.keeps(peaks.positions))
    order = np.random.default_rng(seed).permutation(len(peaks))
    for done in range(0, len(order), max(size, 64)):
        run = order[done : done + max(size, 64)]
        starts, ends = peaks.starts[run], peaks.ends[run]
        own = fired(np.unique(starts // shape.context))
        silent = np.searchsorted(own, starts) == np.searchsorted(own, ends)
        yield from zip(
            peaks.positions[run][silent].tolist(), starts[silent].tolist(), ends[silent].tolist(), strict=True
        )


def draw_similar(
    firings: Firings,
    own: Sequence[Window],
    keep: Filter,
    shape: Shape,
    n: int,
    dedupe: Dedupe,
    embed: Embed | None = None,
) -> list[Window]:
    """`n` silent windows from the tiles of text most alike to the windows `own`, most alike first.

    Alike by BM25 with all tokens of `own` as the query, or by cosine where there is an `embed`. Each is drawn around
    the silent position of its tile whose token weighs most in the query. Tiles that share no token with the query are
    not offered, so fewer than `n` may come back; of a large index only the sampled tiles are (see `similar.py`).
    """
    if not own or not n:
        return []
    texts, chosen, found = keep.store.texts, Chosen(keep.store, dedupe), Silent([], [], [])
    scores, weights = texts.scores(np.concatenate([window.tokens for window in own]).astype(np.int64))
    if embed is not None:
        starts = np.array([w.position - w.peak_at for w in own], np.int64)
        ends = starts + np.array([len(w.tokens) for w in own], np.int64)
        scores = texts.cosines(embed, texts.texts(starts, ends))
    tiles = np.flatnonzero(scores > (0 if embed is None else -np.inf))
    tiles = tiles[keep.keeps_contexts(texts.contexts[tiles // texts.per_context])]
    order = tiles[np.argsort(-scores[tiles], kind="stable")]
    fired, size = firing_in(firings), max(4 * n, 128)
    for done in range(0, len(order), size):
        _best_of_tiles(fired, order[done : done + size], weights, texts, keep, shape, chosen, n, found)
        if len(found.anchors) >= n:
            break
    return found.windows(keep.store)


def _best_of_tiles(
    fired: Fired,
    tiles: Int64[np.ndarray, " n"],
    weights: dict[int, float],
    texts: Texts,
    keep: Filter,
    shape: Shape,
    chosen: Chosen,
    wanted: int,
    found: Silent,
) -> None:
    """From each tile the window around its weightiest silent token, if there is one that may be taken."""
    first, last = texts.bounds(tiles)
    contexts = first // shape.context
    starts, ends = shape.bounds(np.arange(shape.context))
    silent = silent_places(fired(np.unique(contexts)), contexts, starts, ends, keep)
    places = (first % shape.context)[:, None] + np.arange(TILE)
    inside = places < (last - contexts * shape.context)[:, None]
    places = np.minimum(places, shape.context - 1)
    rows = np.arange(len(tiles))[:, None]
    asked = np.array(sorted(weights), np.int64)
    weight_of = np.array([weights[token] for token in asked.tolist()])
    tokens = keep.store.tokens[contexts[:, None], places].astype(np.int64)
    at = np.minimum(np.searchsorted(asked, tokens), max(len(asked) - 1, 0))
    weight = np.where(asked[at] == tokens, weight_of[at], 0.0) if len(asked) else np.zeros(tokens.shape)
    weight = np.where(inside & silent[rows, places], weight, -1.0)
    best = np.argmax(weight, axis=1)
    for row in np.flatnonzero(weight.max(axis=1) >= 0).tolist():
        if len(found.anchors) >= wanted:
            return
        place = int(places[row, best[row]])
        base = int(contexts[row]) * shape.context
        if chosen.offer(base + int(starts[place]), base + int(ends[place])):
            found.take(base + place, base + int(starts[place]), base + int(ends[place]))
