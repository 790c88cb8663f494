"""Which latents fire at the same positions: for each the 64 of the largest Jaccard index, without an F × F matrix.

Positions have *levels* by a fixed hash: half of them level 0, a quarter level 1, and so on. Of every latent the
positions of its level `j` and above are kept, `j` the smallest that leaves no more than a few hundred (see
`sample_size`). What two latents share at the higher of their two levels is an unbiased sample of what they share at
all, of both their positions alike (adaptive sampling: Gibbons 2001), so that

    Jaccard ≈ |A ∩ B| / |A ∪ B| at that level,    standard error ≈ √(J (1 − J) / n), n kept positions of A ∪ B.

Where a whole index is small, everything is kept and the index is exact; so it is between two latents that fire no more
often than `sample_size` says. Nothing is drawn: positions alone decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from unmix.index.statistics import NEIGHBOURS

LEVELS = 33
PAIRS = 2**25
"""Pairs of firings at one position that may always be counted: a second or two. Larger indexes may count two for each
posting."""
LEAST, MOST = 2**6, 2**12
"""Kept positions of a latent, where not everything is."""
ENTRIES = 2**24
"""Kept positions of all latents together, whatever the size: some 400 MB."""
AT_ONCE = 2**20
"""Pairs counted in one go."""


def levels(positions: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, " n"]:
    """0 to 32: how many times the hash of the position halves."""
    mixed = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    exponent = (mixed >> np.uint64(32)).astype(np.float32).view(np.uint32) >> np.uint32(23)
    return np.minimum(np.uint32(158) - np.minimum(exponent, np.uint32(158)), np.uint32(32)).astype(np.uint8)


def sample_size(counts: Int64[np.ndarray, " latents"], n_tokens: int) -> int:
    """Positions that a latent may keep: all of them on a small index, else a power of two from 64 (16) to 4096."""
    total = int(counts.sum())
    budget = max(PAIRS // 2, 2 * total)
    if expected_pairs(counts, n_tokens, n_tokens) <= PAIRS:
        return n_tokens
    size = MOST
    while size > 16:
        affordable = size <= LEAST or expected_pairs(counts, size, n_tokens) <= budget
        if affordable and int(np.minimum(counts, size).sum()) <= ENTRIES:
            break
        size //= 2
    return size


def expected_pairs(counts: Int64[np.ndarray, " latents"], size: int, n_tokens: int) -> float:
    """About how many pairs of kept firings share a position, were latents independent.

    A position of level l keeps the latents whose own level is l or less.
    """
    own = np.ceil(np.log2(np.maximum(counts / size, 1))).astype(np.int64)
    kept = np.cumsum(np.bincount(own, counts, LEVELS)[:LEVELS]) / max(n_tokens, 1)
    positions = n_tokens * 0.5 ** np.arange(1, LEVELS + 1)
    return float((positions * kept * (kept + 1)).sum())


class Sample:
    """The kept positions of all latents, gathered latents ascending."""

    def __init__(self, counts: Int64[np.ndarray, " latents"], n_tokens: int) -> None:
        self.size = sample_size(counts, n_tokens)
        self.n_latents = len(counts)
        self.at_least = np.zeros((len(counts), LEVELS), np.int64)
        """Firings of each latent at positions of each level and above."""
        self.level = np.zeros(len(counts), np.int64)
        self._bits = np.uint64(max(len(counts) - 1, 1).bit_length())
        self._keys: list[np.ndarray] = []
        self._open: dict[int, np.ndarray] = {}

    def add(self, first: int, counts: Int64[np.ndarray, " n"], positions: Int64[np.ndarray, " postings"]) -> None:
        """Take every posting of a run of latents."""
        latent = np.repeat(np.arange(len(counts)), counts)
        level = levels(positions)
        self._count(first, len(counts), latent, level)
        keep = level >= self.level[first : first + len(counts)][latent]
        self._keys.append(self._key(positions[keep], latent[keep] + first))

    def add_piece(self, latent: int, positions: Int64[np.ndarray, " n"]) -> None:
        """Take some postings of one latent; others of it may follow."""
        level = levels(positions)
        self._count(latent, 1, np.zeros(len(level), np.int64), level)
        kept = np.append(self._open.get(latent, np.empty(0, np.int64)), positions[level >= self.level[latent]])
        self._open[latent] = kept[levels(kept) >= self.level[latent]]

    def _key(self, positions: Int64[np.ndarray, " n"], latents: Int64[np.ndarray, " n"]) -> np.ndarray:
        return positions.astype(np.uint64) << self._bits | latents.astype(np.uint64)

    def _count(self, first: int, n: int, latent: Int64[np.ndarray, " m"], level: UInt8[np.ndarray, " m"]) -> None:
        found = np.bincount(latent * LEVELS + level, minlength=n * LEVELS).reshape(n, LEVELS)
        rows = slice(first, first + n)
        self.at_least[rows] += found[:, ::-1].cumsum(axis=1)[:, ::-1]
        self.level[rows] = np.argmax(np.append(self.at_least[rows], np.zeros((n, 1)), axis=1) <= self.size, axis=1)

    def neighbours(self) -> Iterator[tuple[Int32[np.ndarray, "n 64"], Float32[np.ndarray, "n 64"]]]:
        """Ids (-1 where there are fewer) and Jaccard indices, of runs of latents, ascending; the largest first.

        Ties go to the lower id.
        """
        late = [self._key(kept, np.full(len(kept), latent)) for latent, kept in self._open.items()]
        keys = np.concatenate([*self._keys, *late, np.empty(0, np.uint64)])
        self._keys, self._open = [], {}
        keys.sort()
        latents = (keys & ((np.uint64(1) << self._bits) - np.uint64(1))).astype(np.int32)
        keys >>= self._bits
        new = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        starts = np.flatnonzero(new)
        del keys
        lengths = np.diff(starts, append=len(latents))
        order = _by_latent(latents)
        row = (np.cumsum(new, dtype=np.int32) - np.int32(1))[order]
        counts = np.bincount(latents, minlength=self.n_latents)
        ends = np.cumsum(np.bincount(latents[order], lengths[row], self.n_latents)).astype(np.int64)
        del new, order
        entry = np.append(0, np.cumsum(counts))
        # Where latents meet most others a table of all of them is quickest, else a sort of the few.
        table = self.n_latents**2 <= 16 * int(ends[-1])
        most = max(AT_ONCE * 4 // self.n_latents, 1) if table else 2**12
        first = 0
        while first < self.n_latents:
            done = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, done + AT_ONCE, side="right"))
            last = min(max(last, first + 1), first + most, self.n_latents)
            rows = row[entry[first] : entry[last]]
            pairs = _pairs(counts[first:last], starts[rows], lengths[rows], latents, self.n_latents, table)
            yield self._nearest(first, last, *pairs)
            first = last

    def _nearest(
        self,
        first: int,
        last: int,
        one: Int64[np.ndarray, " pairs"],
        other: Int64[np.ndarray, " pairs"],
        shared: Int64[np.ndarray, " pairs"],
    ) -> tuple[Int32[np.ndarray, "n 64"], Float32[np.ndarray, "n 64"]]:
        n = last - first
        keep = one + first != other
        one, other, shared = one[keep], other[keep], shared[keep]
        level = np.maximum(self.level[one + first], self.level[other])
        union = self.at_least[one + first, level] + self.at_least[other, level] - shared
        jaccard = (shared / union).astype(np.float32)
        # One key for falling Jaccard (the bits of a float) and place in the list, which rises with the id.
        starts = np.searchsorted(one, np.arange(n + 1))
        keys = (np.uint64(2**31 - 1) - jaccard.view(np.uint32)) << np.uint64(32)
        keys |= np.arange(len(one), dtype=np.uint64)
        for start, end in pairwise(starts.tolist()):
            keys[start:end].sort()
        ids = np.full((n, NEIGHBOURS), -1, np.int32)
        found = np.zeros((n, NEIGHBOURS), np.float32)
        near = np.arange(NEIGHBOURS) < np.diff(starts)[:, None]
        best = (keys[(starts[:-1, None] + np.arange(NEIGHBOURS))[near]] & np.uint64(2**32 - 1)).astype(np.int64)
        ids[near], found[near] = other[best], jaccard[best]
        return ids, found


def _by_latent(latents: Int32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The stable order by latent. 16-bit keys are sorted by radix, in linear time."""
    order = np.argsort((latents & 0xFFFF).astype(np.uint16), kind="stable")
    if len(latents) and int(latents.max()) >= 2**16:
        order = order[np.argsort((latents >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def _pairs(
    counts: Int64[np.ndarray, " n"],
    starts: Int64[np.ndarray, " entries"],
    lengths: Int64[np.ndarray, " entries"],
    latents: Int32[np.ndarray, " kept"],
    n_latents: int,
    table: bool,
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Latent of the run, other latent, kept positions that they share: every pair that shares any, in order.

    `counts` splits the entries among the latents of the run; those at an entry's position are `latents` from its
    start on, so many.
    """
    n, ends = len(counts), np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    at = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    others = latents[at]
    own = np.repeat(np.repeat(np.arange(n), counts), lengths)
    if table:
        counted = np.bincount(own * n_latents + others, minlength=n * n_latents)
        found = np.flatnonzero(counted)
        return *np.divmod(found, n_latents), counted[found]
    edges = np.append(0, np.cumsum(np.bincount(own, minlength=n)))
    for start, end in pairwise(edges.tolist()):
        others[start:end].sort()
    new = np.ones(total, bool)
    new[1:] = (others[1:] != others[:-1]) | (own[1:] != own[:-1])
    first = np.flatnonzero(new)
    return own[first], others[first].astype(np.int64), np.diff(first, append=total)
