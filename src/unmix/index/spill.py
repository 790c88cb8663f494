"""Sorted runs on disk: what the writer puts down whenever its memory budget is used up.

A spill keeps float32 values; float16 comes once, at the merge, against the latent's maximum over everything
indexed. So the result cannot depend on how many spills there were.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt32

from unmix.core.atomic import disk_errors
from unmix.index.layout import OFFSETS, POSITIONS, VALUES, open_raw, save_raw
from unmix.index.part import Part

BYTES_PER_POSTING = 48
"""Held in memory for each buffered posting at the worst moment: lists 12, their concatenation 12, the sort 24."""


@dataclass(frozen=True)
class Spill:
    """One sorted run of one coder. `base` is the global position that its u32 positions count from."""

    folder: Path
    base: int
    segment: int
    n_latents: int

    def offsets(self) -> Int64[np.ndarray, " latents_plus_1"]:
        """Where each latent's postings start; memory-mapped."""
        return open_raw(self.folder / OFFSETS, np.int64, (self.n_latents + 1,))

    def part(self, first: int, last: int) -> Part:
        """The postings of latents `[first, last)`: two contiguous reads."""
        offsets = self.offsets()[first : last + 1]
        start, n = int(offsets[0]), int(offsets[-1] - offsets[0])
        positions = np.fromfile(self.folder / POSITIONS, np.uint32, n, offset=4 * start)
        values = np.fromfile(self.folder / VALUES, np.float32, n, offset=4 * start)
        return Part(np.diff(offsets), positions.astype(np.int64) + self.base, values)


class Buffer:
    """Postings of one coder since the last spill, in order of position."""

    def __init__(self, n_latents: int) -> None:
        self.n_latents = n_latents
        self.count = 0
        self._latents: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def add(
        self,
        latents: Integer[np.ndarray, " n"],
        positions: UInt32[np.ndarray, " n"],
        values: Float32[np.ndarray, " n"],
    ) -> None:
        """Take postings whose positions follow those taken before."""
        self._latents.append(latents.astype(np.uint32))
        self._positions.append(positions)
        self._values.append(values)
        self.count += len(latents)

    def spill(self, folder: Path, base: int, segment: int) -> Spill:
        """Sort by latent, keeping positions in order, write to `folder` and start empty again."""
        latents = _drain(self._latents, "uint32")
        order = stable_order(latents, self.n_latents)
        offsets = np.zeros(self.n_latents + 1, np.int64)
        np.cumsum(np.bincount(latents, minlength=self.n_latents), out=offsets[1:])
        del latents
        with disk_errors(folder):
            folder.mkdir(parents=True)
            save_raw(folder / OFFSETS, offsets)
            save_raw(folder / POSITIONS, _drain(self._positions, "uint32")[order])
            save_raw(folder / VALUES, _drain(self._values, "float32")[order])
        self.count = 0
        return Spill(folder, base, segment, self.n_latents)


def _drain(parts: list[np.ndarray], dtype: str) -> np.ndarray:
    """The parts as one array; the list is emptied, so that no array is held twice for long."""
    whole = np.concatenate(parts) if parts else np.empty(0, dtype)
    parts.clear()
    return whole


def stable_order(latents: UInt32[np.ndarray, " n"], n_latents: int) -> Int64[np.ndarray, " n"]:
    """The stable order by latent. NumPy sorts 16-bit keys by radix in linear time: one pass, or two for wide coders."""
    order = np.argsort((latents & 0xFFFF).astype(np.uint16), kind="stable")
    if n_latents > 2**16:
        high = (latents >> 16).astype(np.uint16)[order]
        order = order[np.argsort(high, kind="stable")]
    return order
