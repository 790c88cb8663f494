"""Statistics of latents, computed over whole posting lists so that no split of the work can change a bit.

Sums run strictly in order of position, in float64 (decision 20). *Strength* is |value|: maxima, histograms and
top tokens go by it, so that a strongly negative activation counts as a strong one; sums and means keep signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64, Integer, UInt8

HISTOGRAM_BINS = 64
HISTOGRAM_FLOOR = -16.0
"""log2 of the lower edge of bin 0. Bins are half an octave wide: 2^-16 to 2^16; the outer two catch the rest."""
PLACE_BINS = 16
TOP_TOKENS = 10

CHUNK_POSTINGS = 2**20
CHUNK_LATENTS = 2**12
"""20 bits of posting and 12 of latent leave 32 for the token id in one 64-bit sort key."""


def fields(n_latents: int, n_roles: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every array in `statistics/`."""
    return {
        "firings": ("int64", (n_latents, n_roles)),
        "sum": ("float64", (n_latents,)),
        "sum_squares": ("float64", (n_latents,)),
        "histogram": ("int64", (n_latents, HISTOGRAM_BINS)),
        "places": ("int64", (n_latents, PLACE_BINS)),
        "top_token_ids": ("int64", (n_latents, TOP_TOKENS)),
        "top_token_sums": ("float64", (n_latents, TOP_TOKENS)),
        "top_token_counts": ("int64", (n_latents, TOP_TOKENS)),
    }


def figure_paths(folder: Path) -> dict[str, Path]:
    """Field → its raw file in a coder's folder."""
    return {name: folder / "statistics" / f"{name}.bin" for name in fields(0, 0)}


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


def chunk_statistics(
    counts: Int64[np.ndarray, " latents"],
    values: Float32[np.ndarray, " n"],
    places: Int64[np.ndarray, " n"],
    tokens: Integer[np.ndarray, " n"],
    roles: UInt8[np.ndarray, " n"],
    context: int,
    n_roles: int,
) -> dict[str, np.ndarray]:
    """The rows of every field for a run of latents.

    `counts` splits the postings among the latents; `places` are positions inside their context, `tokens` and
    `roles` those of each posting.
    """
    n = len(counts)
    latent = np.repeat(np.arange(n), counts)
    exact = values.astype(np.float64)
    bins = min(PLACE_BINS, context)
    place_bins = places * bins // context
    ids, sums, token_counts = top_tokens(counts, latent, tokens, np.abs(exact))
    place_counts = np.bincount(latent * PLACE_BINS + place_bins, minlength=n * PLACE_BINS)
    rows = {
        "firings": np.bincount(latent * n_roles + roles, minlength=n * n_roles).reshape(n, n_roles),
        "sum": np.bincount(latent, exact, n),
        "sum_squares": np.bincount(latent, exact * exact, n),
        "histogram": np.bincount(
            latent * HISTOGRAM_BINS + histogram_bins(np.abs(values)), minlength=n * HISTOGRAM_BINS
        ).reshape(n, HISTOGRAM_BINS),
        "places": place_counts.reshape(n, PLACE_BINS),
        "top_token_ids": ids,
        "top_token_sums": sums,
        "top_token_counts": token_counts,
    }
    kinds = fields(n, n_roles)
    return {name: array.astype(kinds[name][0], copy=False) for name, array in rows.items()}


def top_tokens(
    counts: Int64[np.ndarray, " latents"],
    latent: Int64[np.ndarray, " n"],
    tokens: Integer[np.ndarray, " n"],
    strength: Float64[np.ndarray, " n"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, summed strengths and firing counts [latents, 10] of the tokens on which each latent is strongest.

    By summed strength, exact; ties go to the lower token id. Unused places hold id -1, sum 0, count 0.
    """
    n = len(counts)
    ids = np.full((n, TOP_TOKENS), -1, np.int64)
    sums, fired = np.zeros((n, TOP_TOKENS)), np.zeros((n, TOP_TOKENS), np.int64)
    if not len(tokens):
        return ids, sums, fired
    posting_bits = np.uint64(max(len(tokens) - 1, 1).bit_length())
    token_bits = np.uint64(max(int(tokens.max()), 1).bit_length())
    wide = tokens.astype(np.uint64)
    keys = ((latent.astype(np.uint64) << token_bits | wide) << posting_bits) | np.arange(len(tokens), dtype=np.uint64)
    keys.sort()
    group_of = keys >> posting_bits
    starts = np.concatenate([[0], np.flatnonzero(group_of[1:] != group_of[:-1]) + 1])
    order = (keys & ((np.uint64(1) << posting_bits) - np.uint64(1))).astype(np.int64)
    lengths = np.diff(np.append(starts, len(keys)))
    group = np.repeat(np.arange(len(starts)), lengths)
    group_sums = np.bincount(group, strength[order], len(starts))
    group_tokens = tokens[order[starts]].astype(np.int64)
    bounds = np.searchsorted(latent[order[starts]], np.arange(n + 1))
    for i in np.flatnonzero(counts):
        begin, end = int(bounds[i]), int(bounds[i + 1])
        best = begin + strongest(group_sums[begin:end], TOP_TOKENS)
        ids[i, : len(best)] = group_tokens[best]
        sums[i, : len(best)] = group_sums[best]
        fired[i, : len(best)] = lengths[best]
    return ids, sums, fired


def strongest(sums: Float64[np.ndarray, " n"], k: int) -> Int64[np.ndarray, " m"]:
    """Places of the `k` largest, largest first; ties go to the earlier place."""
    places = np.arange(len(sums))
    if len(sums) > k:
        places = np.flatnonzero(sums >= np.partition(sums, -k)[-k])
    return places[np.argsort(-sums[places], kind="stable")][:k]


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
