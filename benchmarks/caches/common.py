"""What both sides read, and how a latent is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HOOK, CONTEXT, BATCH, SPLITS, VOCAB = "layers.0", 128, 8, 5, 49152


def load(folder: Path, latents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Ids [tokens, k], values, tokens [rows, context], number of latents."""
    ids, values, tokens = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "values", "tokens"))
    return ids, values, tokens, latents


# ours -----------------------------------------------------------------------------------------------------------


def each(show: Callable[[int], int], chosen: list[int]) -> list[float]:
    show(chosen[0])
    times: list[float] = []
    for latent in chosen:
        begun = time.perf_counter()
        assert show(latent) > 0
        times.append(1000 * (time.perf_counter() - begun))
    return times
