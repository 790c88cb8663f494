"""What `statistics/` of a coder holds, and the bins and rankings of tokens behind it.

*Strength* is |value|: maxima, quantiles, histograms and top tokens go by it, so that a strongly negative activation
counts as a strong one; sums, means and moments keep signs. Everything is said of the stored (rounded) values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64, Integer

from unmix.index.layout import IndexMeta

HISTOGRAM_BINS = 64
HISTOGRAM_FLOOR = -16.0
"""log2 of the lower edge of bin 0. Bins are half an octave wide: 2^-16 to 2^16; the outer two catch the rest."""
PLACE_BINS = 16
TOP_TOKENS = 10
RANKS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
"""Percent: the stored quantiles of strength."""
NEIGHBOURS = 64
STRETCHES = 64

CHUNK_POSTINGS = 2**17
"""Postings worked on at once: so few that they stay in the processor's cache."""
CHUNK_LATENTS = 2**12


def fields(n_latents: int, meta: IndexMeta) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every array in `statistics/`. Counts take 32 bits where the index has fewer tokens."""
    count = "uint32" if meta.n_tokens < 2**32 else "uint64"
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {
        "firings": (count, ()),
        "documents": (count, ()),
        "squares": ("int64", ()),
        "cross": ("int64", ()),
        "sum": ("float64", ()),
        "strength": ("float64", ()),
        "moments": ("float64", (3,)),
        "extremes": ("float32", (2,)),
        "quantiles": ("float32", (len(RANKS),)),
        "histogram": (count, (HISTOGRAM_BINS,)),
        "places": (count, (PLACE_BINS,)),
    }
    kinds |= {"co_firing_ids": ("int32", (NEIGHBOURS,)), "co_firing_jaccard": ("float32", (NEIGHBOURS,))}
    for order in ("top", "frequent"):
        kinds[f"{order}_token_ids"] = ("int64" if meta.token_dtype == "uint32" else "int32", (TOP_TOKENS,))
        kinds[f"{order}_token_sums"] = ("float64", (TOP_TOKENS,))
        kinds[f"{order}_token_counts"] = (count, (TOP_TOKENS,))
    by_latent = {name: (dtype, (n_latents, *shape)) for name, (dtype, shape) in kinds.items()}
    for name, values in partitions(meta).items():
        by_latent |= {
            f"{name}.firings": (count, (n_latents, len(values))),
            f"{name}.sum": ("float64", (n_latents, len(values))),
            f"{name}.documents": (count, (n_latents, len(values))),
            f"{name}.squares": ("int64", (n_latents, len(values))),
            f"{name}.cross": ("int64", (n_latents, len(values))),
            f"{name}.totals": ("int64", (len(values) + 1, 3)),
        }
    return by_latent | {"place_totals": ("int64", (PLACE_BINS,))}


def partitions(meta: IndexMeta) -> dict[str, tuple[str, ...]]:
    """Ways in which positions are parted → names of the values: the roles, and every slicing of the index."""
    return {"roles": meta.roles} | {f"slice-{name}": values for name, values in meta.slices.items()}


def figure_paths(folder: Path, meta: IndexMeta) -> dict[str, Path]:
    """Field → its raw file in a coder's folder."""
    return {name: folder / "statistics" / f"{name}.bin" for name in fields(0, meta)}


def histogram_edges() -> Float64[np.ndarray, " 65"]:
    """The 65 edges of the 64 strength bins; the outer ones stand for 0 and infinity."""
    edges = 2.0 ** (HISTOGRAM_FLOOR + 0.5 * np.arange(HISTOGRAM_BINS + 1))
    edges[0], edges[-1] = 0.0, np.inf
    return edges


def histogram_bins(strength: Float32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Bin of each strength. From mantissa and exponent: exact, and the same on every machine."""
    mantissa, exponent = np.frexp(strength)
    half = (mantissa >= np.float32(2**-0.5)).astype(np.int64)
    bins = 2 * (exponent.astype(np.int64) - 1) + half - int(2 * HISTOGRAM_FLOOR)
    return np.clip(bins, 0, HISTOGRAM_BINS - 1)


@dataclass(frozen=True)
class TokenGroups:
    """Every token on which each of a run of latents fires, by latent, then by token id."""

    lengths: Int64[np.ndarray, " latents"]
    """Tokens of each latent."""
    latent: Int64[np.ndarray, " groups"]
    token: Int64[np.ndarray, " groups"]
    sums: Float64[np.ndarray, " groups"]
    """Summed strength, in order of position."""
    counts: Int64[np.ndarray, " groups"]

    def by_count(self) -> Float64[np.ndarray, " groups"]:
        """A score that orders a latent's tokens by firings, then by falling id: without ties, which are many."""
        starts = np.cumsum(self.lengths) - self.lengths
        place = np.arange(len(self.token)) - np.repeat(starts, self.lengths)
        return self.counts * float(self.lengths.max(initial=1)) - place


def token_groups(
    counts: Int64[np.ndarray, " latents"],
    latent: Int64[np.ndarray, " n"],
    tokens: Integer[np.ndarray, " n"],
    strength: Float64[np.ndarray, " n"],
) -> TokenGroups:
    """Strength and firings of each latent on each token. `counts` splits the postings; `latent` numbers them."""
    if not len(tokens):
        none = np.empty(0, np.int64)
        return TokenGroups(np.zeros(len(counts), np.int64), none, none, np.empty(0), none)
    ends = np.cumsum(counts)
    starts = ends - counts
    bits = int(counts.max()).bit_length()
    kind = np.uint32 if bits + int(tokens.max()).bit_length() <= 32 else np.uint64
    own = np.arange(len(tokens)) - np.repeat(starts, counts)
    keys = tokens.astype(kind) << kind(bits) | own.astype(kind)
    # Latent by latent: short runs sort in the cache, five times faster than all at once.
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        keys[start:end].sort()
    token = keys >> kind(bits)
    order = (keys & kind((1 << bits) - 1)).astype(np.int64) + np.repeat(starts, counts)
    new = np.empty(len(keys), bool)
    new[0] = True
    np.not_equal(token[1:], token[:-1], out=new[1:])
    new[starts[counts > 0]] = True
    first = np.flatnonzero(new)
    sums = np.bincount(np.cumsum(new) - 1, strength[order], len(first))
    lengths = np.bincount(latent[first], minlength=len(counts))
    return TokenGroups(lengths, latent[first], token[first].astype(np.int64), sums, np.diff(first, append=len(keys)))


def best_tokens(
    groups: TokenGroups, score: Float64[np.ndarray, " groups"]
) -> tuple[Int64[np.ndarray, "latents 10"], Float64[np.ndarray, "latents 10"], Int64[np.ndarray, "latents 10"]]:
    """Ids, summed strengths and firings of the ten tokens of the largest score; ties go to the lower token id.

    Unused places hold id -1, sum 0, count 0.
    """
    shape = (len(groups.lengths), TOP_TOKENS)
    ids, sums, fired = np.full(shape, -1, np.int64), np.zeros(shape), np.zeros(shape, np.int64)
    kept = np.flatnonzero(score >= np.repeat(tenth_largest(score, groups.lengths), groups.lengths))
    kept = kept[np.lexsort((groups.token[kept], -score[kept], groups.latent[kept]))]
    owner = groups.latent[kept]
    place = np.arange(len(kept)) - np.searchsorted(owner, owner)
    kept, owner, place = (x[place < TOP_TOKENS] for x in (kept, owner, place))
    ids[owner, place], sums[owner, place] = groups.token[kept], groups.sums[kept]
    fired[owner, place] = groups.counts[kept]
    return ids, sums, fired


def tenth_largest(
    score: Float64[np.ndarray, " n"], lengths: Int64[np.ndarray, " runs"]
) -> Float64[np.ndarray, " runs"]:
    """Of each run a score that at least ten of it reach, near its tenth largest; minus infinity where it has no ten.

    It is the tenth largest of the maxima of 64 stretches of the run: three reads of memory instead of a sort.
    """
    least, starts = np.full(len(lengths), -np.inf), np.cumsum(lengths) - lengths
    few, many = np.flatnonzero((lengths > TOP_TOKENS) & (lengths < STRETCHES)), np.flatnonzero(lengths >= STRETCHES)
    inside = np.arange(STRETCHES) < lengths[few, None]
    table = np.full(inside.shape, -np.inf)
    table[inside] = score[(starts[few, None] + np.arange(STRETCHES))[inside]]
    # Stretches grow with the token id, for low ids are the frequent ones in most vocabularies.
    steps = np.arange(STRETCHES)
    edges = starts[many, None] + np.maximum(lengths[many, None] * steps**2 // STRETCHES**2, steps)
    # `reduceat` goes on to the next edge, which for the last stretch of a run may lie beyond the run: cut there.
    cuts = np.append(edges, (starts + lengths)[many, None], axis=1).reshape(-1)
    if len(many):
        wide = np.maximum.reduceat(np.append(score, -np.inf), cuts).reshape(len(many), STRETCHES + 1)[:, :-1]
        least[many] = np.partition(wide, STRETCHES - TOP_TOKENS, axis=1)[:, STRETCHES - TOP_TOKENS]
    if len(few):
        least[few] = np.partition(table, STRETCHES - TOP_TOKENS, axis=1)[:, STRETCHES - TOP_TOKENS]
    return least


def top_tokens(
    counts: Int64[np.ndarray, " latents"],
    latent: Int64[np.ndarray, " n"],
    tokens: Integer[np.ndarray, " n"],
    strength: Float64[np.ndarray, " n"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, summed strengths and firing counts [latents, 10] of the tokens on which each latent is strongest."""
    groups = token_groups(counts, latent, tokens, strength)
    return best_tokens(groups, groups.sums)


def chunks(counts: Int64[np.ndarray, " latents"], postings: int = CHUNK_POSTINGS) -> Sequence[tuple[int, int]]:
    """Runs of latents `[first, last)` with at most `postings` postings together, or one latent that has more."""
    ends = np.cumsum(counts)
    runs: list[tuple[int, int]] = []
    first, done = 0, 0
    while first < len(counts):
        last = int(np.searchsorted(ends, done + postings, side="right"))
        last = min(max(last, first + 1), first + CHUNK_LATENTS)
        runs.append((first, last))
        first, done = last, int(ends[last - 1])
    return runs
