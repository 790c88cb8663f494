"""From postings of a run of latents to the rows of their statistics.

Sums are of float64, latent by latent, in order of position. Latents of more than `DENSE` postings are taken one by
one, in blocks of `BLOCK` of their own postings: a rule about the latent alone, so no cut of the work changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, Integer, UInt8

from unmix.index.statistics import (
    HISTOGRAM_BINS,
    PLACE_BINS,
    RANKS,
    TokenGroups,
    best_tokens,
    histogram_bins,
    token_groups,
)
from unmix.index.totals import Extent, Totals

DENSE = 2**15
"""Latents with more postings are counted by tables of all tokens and of all strengths; others are sorted."""
BLOCK = 2**17
NARROW = 16
"""Partitions of no more values are counted by a table for each document."""
TABLE = 2**22
"""Token ids of more than this are never counted by a table of all of them."""
KEPT_BITS = 18
"""First bits of a strength by which dense latents are counted for quantiles: no stored value has more, but for the
largest (which is kept exact) and for subnormal ones."""


@dataclass(frozen=True)
class Block:
    """Postings of a run of latents, at most `BLOCK` of each, and what stands at their positions."""

    counts: Int64[np.ndarray, " latents"]
    values: Float32[np.ndarray, " n"]
    tokens: Integer[np.ndarray, " n"]
    places: Integer[np.ndarray, " n"]
    """Bin of the place inside the context, below `PLACE_BINS`."""
    documents: Integer[np.ndarray, " n"]
    parts: Mapping[str, UInt8[np.ndarray, " n"]]
    """Of each partition, the number of the value that a posting belongs to."""


class Tally:
    """Adds up blocks: one block with all postings of a run of latents, or (`dense`) one or more of one latent.

    Token ids are below `vocab`.
    """

    def __init__(self, n_latents: int, totals: Totals, vocab: int, dense: bool) -> None:
        self.n, self.totals, self.dense = n_latents, totals, dense
        self.values = {name: extent.width for name, extent in totals.parts.items()}
        self.counts = np.zeros(n_latents, np.int64)
        self.sum, self.strength = np.zeros(n_latents), np.zeros(n_latents)
        self.lowest, self.highest = np.full(n_latents, np.inf), np.full(n_latents, -np.inf)
        self.histogram = np.zeros((n_latents, HISTOGRAM_BINS), np.int64)
        self.places = np.zeros((n_latents, PLACE_BINS), np.int64)
        self.part_firings = {name: np.zeros((n_latents, v), np.int64) for name, v in self.values.items()}
        self.part_sums = {name: np.zeros((n_latents, v)) for name, v in self.values.items()}
        self._keys: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in self.values}
        self._groups: list[TokenGroups] = []
        self._strengths = np.empty(0, np.float32)
        self._kept, self._largest, self._n_largest = np.zeros(2**KEPT_BITS if dense else 0, np.int64), 0.0, 0
        self._by_token = (np.zeros(vocab), np.zeros(vocab, np.int64)) if dense and vocab <= TABLE else None

    def add(self, block: Block) -> None:
        """Take one block."""
        latent = np.repeat(np.arange(self.n), block.counts)
        exact, strength = block.values.astype(np.float64), np.abs(block.values)
        wide = strength.astype(np.float64)
        self.counts += block.counts
        self.sum += run_sums(block.counts, exact)
        self.strength += run_sums(block.counts, wide)
        self.lowest = np.minimum(self.lowest, reduce_runs(np.minimum, block.counts, block.values, np.inf))
        self.highest = np.maximum(self.highest, reduce_runs(np.maximum, block.counts, block.values, -np.inf))
        self.histogram += _count(latent, histogram_bins(strength), self.n, HISTOGRAM_BINS)
        self.places += _count(latent, block.places, self.n, PLACE_BINS)
        for name, numbers in block.parts.items():
            width = self.values[name]
            cell = latent * width + numbers
            self.part_firings[name] += np.bincount(cell, minlength=self.n * width).reshape(self.n, width)
            self.part_sums[name] += np.bincount(cell, exact, self.n * width).reshape(self.n, width)
            self._keys[name].append(_distinct(block, latent, numbers, width))
        if self._by_token is not None:
            sums, counts = self._by_token
            sums += np.bincount(block.tokens, wide, len(sums))
            counts += np.bincount(block.tokens, minlength=len(sums))
        else:
            self._groups.append(token_groups(block.counts, latent, block.tokens, wide))
        if self.dense:
            self._count_strengths(strength)
        else:
            self._strengths = strength

    def _count_strengths(self, strength: Float32[np.ndarray, " n"]) -> None:
        self._kept += np.bincount(strength.view(np.uint32) >> (31 - KEPT_BITS), minlength=2**KEPT_BITS)
        largest = float(strength.max())
        if largest > self._largest:
            self._largest, self._n_largest = largest, 0
        if largest == self._largest:
            self._n_largest += int((strength == strength.dtype.type(largest)).sum())

    def rows(self, moments: Float64[np.ndarray, "latents 3"]) -> dict[str, np.ndarray]:
        """The rows of every field, the co-firing ones apart."""
        top, frequent = self._tokens()
        alive = self.counts > 0
        found = {
            "firings": self.counts, "sum": self.sum, "strength": self.strength, "moments": moments,
            "extremes": np.stack([np.where(alive, self.lowest, 0), np.where(alive, self.highest, 0)], axis=1),
            "quantiles": self._quantiles(), "histogram": self.histogram, "places": self.places,
            "top_token_ids": top[0], "top_token_sums": top[1], "top_token_counts": top[2],
            "frequent_token_ids": frequent[0], "frequent_token_sums": frequent[1], "frequent_token_counts": frequent[2],
        }  # fmt: skip
        for name in self.values:
            latent, keys, fired = self._merged_keys(name)
            found |= {f"{name}.firings": self.part_firings[name], f"{name}.sum": self.part_sums[name]}
            by_document = self._by_document(latent, keys >> 8, keys & 0xFF, fired, self.totals.parts[name])
            found |= {f"{name}.{field}": array for field, array in by_document.items()}
            if "documents" not in found:
                first = np.ones(len(keys), bool)
                first[1:] = (keys[1:] >> 8 != keys[:-1] >> 8) | (latent[1:] != latent[:-1])
                first = np.flatnonzero(first)
                fired = np.add.reduceat(fired, first) if len(first) else fired
                one = np.zeros(len(first), np.int64)
                whole = self._by_document(latent[first], keys[first] >> 8, one, fired, self.totals.whole)
                found |= {field: array[:, 0] for field, array in whole.items()}
        return found

    def _by_document(
        self,
        latent: Int64[np.ndarray, " n"],
        documents: Int64[np.ndarray, " n"],
        values: Int64[np.ndarray, " n"],
        fired: Int64[np.ndarray, " n"],
        extent: Extent,
    ) -> dict[str, Int64[np.ndarray, "latents values"]]:
        """Documents, sums of the squares of firings in them, and of firings × positions, of each latent and value."""
        weights = {"squares": fired * fired, "cross": fired * extent.of(documents, values)}
        if extent.width == 1:
            found = np.bincount(latent, minlength=self.n)
            sums = {field: reduce_runs(np.add, found, weight, 0) for field, weight in weights.items()}
            return {"documents": found[:, None]} | {field: array[:, None] for field, array in sums.items()}
        cell, size = latent * extent.width + values, self.n * extent.width
        sums = {field: np.bincount(cell, weight, size) for field, weight in weights.items()}
        sums["documents"] = np.bincount(cell, minlength=size)
        return {field: array.astype(np.int64).reshape(self.n, extent.width) for field, array in sums.items()}

    def _merged_keys(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = self._keys[name]
        if len(parts) == 1:
            return parts[0]
        keys = np.concatenate([keys for _, keys, _ in parts])
        fired = np.concatenate([fired for _, _, fired in parts])
        if (keys[1:] < keys[:-1]).any():
            order = np.argsort(keys, kind="stable")
            keys, fired = keys[order], fired[order]
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        return np.zeros(len(first), np.int64), keys[first], np.add.reduceat(fired, first)

    def _tokens(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        if self._by_token is not None:
            sums, counts = self._by_token
            token = np.flatnonzero(counts)
            self._groups = [_alone(token, sums[token], counts[token])]
        groups = self._groups[0]
        for more in self._groups[1:]:
            groups = _join(groups, more)
        return best_tokens(groups, groups.sums), best_tokens(groups, groups.by_count())

    def _quantiles(self) -> Float32[np.ndarray, "latents ranks"]:
        """Strengths at fixed ranks, each one that occurs: of n in order, the one at `rank · (n − 1) // 100`."""
        found = np.zeros((self.n, len(RANKS)), np.float32)
        at = np.asarray(RANKS) * np.maximum(self.counts - 1, 0)[:, None] // 100
        if self.dense:
            found[0] = from_first_bits(np.searchsorted(np.cumsum(self._kept), at[0], side="right"))
            found[0, at[0] >= self.counts[0] - self._n_largest] = self._largest
            return found
        ordered = self._strengths
        ends = np.cumsum(self.counts)
        for start, end in zip((ends - self.counts).tolist(), ends.tolist(), strict=True):
            ordered[start:end].sort()
        alive = self.counts > 0
        found[alive] = ordered[(ends - self.counts)[alive, None] + at[alive]]
        return found


def central_moments(
    blocks: Iterable[tuple[Int64[np.ndarray, " latents"], Float32[np.ndarray, " n"]]],
    mean: Float64[np.ndarray, " latents"],
) -> Float64[np.ndarray, "latents 3"]:
    """Sums of the second, third and fourth powers of `value − mean`, from blocks as `(counts, values)`."""
    sums = np.zeros((len(mean), 3))
    for counts, values in blocks:
        away = values.astype(np.float64) - np.repeat(mean, counts)
        square = away * away
        sums[:, 0] += run_sums(counts, square)
        sums[:, 1] += run_sums(counts, square * away)
        sums[:, 2] += run_sums(counts, square * square)
    return sums


def run_sums(
    counts: Int64[np.ndarray, " latents"], weights: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " latents"]:
    """The sum of each latent's weights; each depends on its own run alone."""
    return reduce_runs(np.add, counts, weights, 0.0)


def reduce_runs(how: np.ufunc, counts: Int64[np.ndarray, " latents"], values: np.ndarray, empty: float) -> np.ndarray:
    """`how` over each latent's run of values, in their type; `empty` for a latent without any."""
    result = np.full(len(counts), empty, values.dtype)
    alive = np.flatnonzero(counts)
    if len(alive):
        result[alive] = how.reduceat(values, (np.cumsum(counts) - counts)[alive])
    return result


def _count(latent: Int64[np.ndarray, " n"], bins: Integer[np.ndarray, " n"], n: int, width: int) -> np.ndarray:
    return np.bincount(latent * width + bins, minlength=n * width).reshape(n, width)


def _distinct(
    block: Block, latent: Int64[np.ndarray, " n"], numbers: UInt8[np.ndarray, " n"], width: int
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """Latent, key `document · 256 + value` and firings of every different pair in which a latent fires, ascending.

    Documents nearly always ascend with the positions, and values often stay the same inside them: then keys ascend
    already. Where only values go to and fro, a table of each document's values will do; else latents are sorted.
    """
    keys = block.documents.astype(np.int64) << 8 | numbers
    same = latent[1:] == latent[:-1]
    falls = (keys[1:] < keys[:-1]) & same
    if falls.any():
        if width <= NARROW and not (falls & (keys[1:] >> 8 < keys[:-1] >> 8)).any():
            first = np.flatnonzero(np.append(True, (keys[1:] >> 8 != keys[:-1] >> 8) | ~same))
            run = np.repeat(np.arange(len(first)) * width, np.diff(first, append=len(keys)))
            fired = np.bincount(run + numbers, minlength=len(first) * width)
            found = np.flatnonzero(fired)
            first, value = first[found // width], found % width
            return latent[first], (keys[first] >> 8) << 8 | value, fired[found]
        ends = np.cumsum(block.counts)
        for i in np.flatnonzero(np.bincount(latent[1:][falls])).tolist():
            keys[ends[i] - block.counts[i] : ends[i]].sort()
    first = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]) | ~same)[: len(keys)])
    return latent[first], keys[first], np.diff(first, append=len(keys))


def from_first_bits(kept: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """The strength whose first 18 bits (exponent and 10 of mantissa) are these, and whose others are 0."""
    return (kept.astype(np.uint32) << np.uint32(31 - KEPT_BITS)).view(np.float32)


def _alone(token: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> TokenGroups:
    """Groups of a single latent."""
    return TokenGroups(np.array([len(token)]), np.zeros(len(token), np.int64), token, sums, counts)


def _join(one: TokenGroups, other: TokenGroups) -> TokenGroups:
    """Groups of the same single latent, added; `one` came first."""
    tokens = np.concatenate([one.token, other.token])
    order = np.argsort(tokens, kind="stable")
    new = np.append(True, tokens[order][1:] != tokens[order][:-1])
    group, first = np.cumsum(new) - 1, np.flatnonzero(new)
    sums = np.bincount(group, np.concatenate([one.sums, other.sums])[order], len(first))
    counts = np.concatenate([one.counts, other.counts])[order]
    return _alone(tokens[order][first], sums, np.add.reduceat(counts, first))
