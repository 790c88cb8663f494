"""Latent-major postings of a run of latents: what sorted runs, segments and statistics hand to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64


@dataclass(frozen=True)
class Part:
    """Latent-major postings of a run of latents: `counts` splits them, positions are global and ascend."""

    counts: Int64[np.ndarray, " latents"]
    positions: Int64[np.ndarray, " n"]
    values: Float32[np.ndarray, " n"]


def interleave(parts: Sequence[Part]) -> Part:
    """Concatenate per latent, in the order of the parts; no loop over latents."""
    if len(parts) == 1:
        return parts[0]
    counts = np.stack([part.counts for part in parts]).sum(axis=0)
    total = int(counts.sum())
    positions, values = np.empty(total, np.int64), np.empty(total, np.float32)
    next_free = np.cumsum(counts) - counts
    for part in parts:
        starts = np.cumsum(part.counts) - part.counts
        target = np.repeat(next_free - starts, part.counts) + np.arange(len(part.positions))
        positions[target], values[target] = part.positions, part.values
        next_free = next_free + part.counts
    return Part(counts, positions, values)
