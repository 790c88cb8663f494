"""Postings of an index, run of latents by run of latents."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Int64

from unmix.index.reader import CoderIndex, LatentIndex
from unmix.index.store import PostingStore


def latent_runs(counts: Int64[np.ndarray, " n"], first: int, at_most: int) -> list[tuple[int, int]]:
    """Runs `[first, last)` of consecutive things with at most `at_most` entries together, or one that has more."""
    ends = np.cumsum(counts)
    edges, done = [0], 0
    while edges[-1] < len(counts):
        last = int(np.searchsorted(ends, done + at_most, side="right"))
        edges.append(max(last, edges[-1] + 1))
        done = int(ends[edges[-1] - 1])
    return [(first + start, first + stop) for start, stop in pairwise(edges)]


def open_postings(index: LatentIndex, coder: CoderIndex) -> PostingStore:
    """The stored postings of one coder."""
    return PostingStore(index.folder, index.description, index.description.coders[coder.name])


def postings(
    store: PostingStore, first: int, last: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Latent, global position and value of every posting of latents `[first, last)`, latent by latent."""
    part = store.part(first, last)
    return np.repeat(np.arange(first, last), part.counts), part.positions, part.values
