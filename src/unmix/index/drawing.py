"""Drawing windows: bounded reading of what fires, choice among its peaks, and windows made all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from unmix.index.choosing import Chosen, Dedupe, choose, tenths
from unmix.index.documents import ranges
from unmix.index.filters import Filter
from unmix.index.firings import SAMPLE, Firings, Positions, Values, expected, read_contexts, sampled
from unmix.index.store import TokenStore
from unmix.index.windows import Peaks, Shape, Window, find_peaks

FEW = 64
"""Strongest firings read at first where only the strongest windows are wanted, at least."""
EACH = 64
"""Firings drawn from for each window wanted, at least."""


def draw_windows(
    firings: Firings, keep: Filter, shape: Shape, kind: str, n: int, seed: int, dedupe: Dedupe = True
) -> list[Window]:
    """`n` windows around peaks that the filter keeps, strongest first; fewer where there are fewer.

    "top" is exact at any size. The other kinds draw from every peak of up to `SAMPLE` firings (or `EACH` for each
    window wanted). Of something that fires more often they draw from a uniform sample of whole contexts with about so
    many firings (see `sampled`), larger where the filter leaves too little in it.
    """
    if n == 0:
        return []
    if kind == "top" and expected(firings, keep) > max(SAMPLE, EACH * n):
        return _draw_top(firings, keep, shape, n, dedupe)
    size = max(SAMPLE, EACH * n)
    while True:
        if kind == "top":
            (positions, values), whole = read_contexts(firings, keep), True
        else:
            positions, values, whole = sampled(firings, keep, seed, size)
        peaks = _kept(find_peaks(positions, values, shape), keep)
        taken = np.array(choose(peaks, kind, n, seed, Chosen(keep.store, dedupe)), np.int64)
        if len(taken) == n or whole:
            break
        size *= 8
    tenth = tenths(len(peaks))[taken].tolist() if kind == "quantiles" else None
    chosen = (peaks.positions[taken], peaks.starts[taken], peaks.ends[taken])
    return make_windows(keep.store, positions, values, *chosen, tenth)


def _draw_top(firings: Firings, keep: Filter, shape: Shape, n: int, dedupe: Dedupe) -> list[Window]:
    """The strongest windows without reading what is weak: whatever is stronger than a firing was read with it."""
    wanted = max(3 * n, FEW)
    while True:
        positions, values, floor = firings.strongest(wanted)
        peaks = _kept(find_peaks(positions, values, shape), keep)
        taken = np.array(choose(peaks, "top", n, 0, Chosen(keep.store, dedupe)), np.int64)
        if len(taken) == n or floor == 0:
            break
        wanted *= 4
    anchors, starts, ends = peaks.positions[taken], peaks.starts[taken], peaks.ends[taken]
    positions, values = firings.within(np.unique(anchors // shape.context))
    return make_windows(keep.store, positions, values, anchors, starts, ends)


def _kept(peaks: Peaks, keep: Filter) -> Peaks:
    """The peaks whose position fits: the window's strongest firing itself, not some other one."""
    if keep.everywhere and not keep.where:
        return peaks
    return peaks.where(keep.keeps(peaks.positions))


def make_windows(
    store: TokenStore,
    positions: Positions,
    values: Values,
    anchors: Int64[np.ndarray, " windows"],
    starts: Int64[np.ndarray, " windows"],
    ends: Int64[np.ndarray, " windows"],
    tenth: Sequence[int] | None = None,
    neighbour: Sequence[int] | None = None,
) -> list[Window]:
    """Windows of something that fires at `positions` (at least all of its firings inside them). One gather for all."""
    if not len(anchors):
        return []
    places = ranges(starts, ends)
    tokens = store.tokens.reshape(-1)[places].astype(np.int64)
    shown = _values(positions, values, starts, ends, len(places))
    contexts = anchors // store.context
    cuts = np.concatenate([[0], np.cumsum(ends - starts)]).tolist()
    documents = store.documents.reshape(-1)[anchors].tolist()
    roles = store.role_of[contexts].tolist()
    rows = zip(anchors.tolist(), starts.tolist(), contexts.tolist(), documents, roles, strict=True)
    windows: list[Window] = []
    for i, (anchor, start, context, document, role) in enumerate(rows):
        part = slice(cuts[i], cuts[i + 1])
        windows.append(
            Window(
                tokens[part], shown[part], document, anchor, context, start - context * store.context,
                store.roles[role], store.vocab, anchor - start,
                None if tenth is None else tenth[i], None if neighbour is None else neighbour[i],
            )
        )  # fmt: skip
    return windows


def _values(
    positions: Positions,
    values: Values,
    starts: Int64[np.ndarray, " windows"],
    ends: Int64[np.ndarray, " windows"],
    total: int,
) -> Float32[np.ndarray, " total"]:
    """Activation at every place of the windows, one window after another; 0 where nothing fires."""
    first, last = np.searchsorted(positions, starts), np.searchsorted(positions, ends)
    inside = ranges(first, last)
    lengths = ends - starts
    shift = np.cumsum(lengths) - lengths - starts
    shown = np.zeros(total, np.float32)
    shown[positions[inside] + np.repeat(shift, last - first)] = values[inside]
    return shown
