"""Sorted runs: postings in order of position become latent-major, in memory block by block, then on disk.

A block of about a million postings is sorted while it lies in the processor's cache; blocks are woven together when
the memory budget is used up or a shard ends, and put on disk as one run. Runs keep float32 values: float16 comes
once, in the segment, so the result cannot depend on how many runs or blocks there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt32

from unmix.core.atomic import disk_errors
from unmix.index.layout import OFFSETS, POSITIONS, VALUES, open_raw, save_raw, write_raw

BLOCK = 2**20
"""Postings sorted in one go at most: 27 ns a posting; ones that overflow the cache cost 77."""
WOVEN = 2**20
"""Postings woven in one go, and (latent, run) pairs."""


@dataclass(frozen=True)
class Run:
    """One sorted run of one coder on disk. `base` is the global position that its u32 positions count from."""

    folder: Path
    base: int
    n_latents: int

    def offsets(self) -> Int64[np.ndarray, " latents_plus_1"]:
        """Where each latent's postings start; memory-mapped, which holds a file open as long as the array lives."""
        return open_raw(self.folder / OFFSETS, np.int64, (self.n_latents + 1,))

    def starts(self, first: int, last: int) -> Int64[np.ndarray, " n_plus_1"]:
        """Where the postings of latents `[first, last)` start, and where they end."""
        return np.fromfile(self.folder / OFFSETS, np.int64, last - first + 1, offset=8 * first)

    def read(self, start: int, end: int) -> tuple[UInt32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Postings `[start, end)`: two contiguous reads."""
        positions = np.fromfile(self.folder / POSITIONS, np.uint32, end - start, offset=4 * start)
        values = np.fromfile(self.folder / VALUES, np.float32, end - start, offset=4 * start)
        return positions, values


@dataclass(frozen=True)
class _Block:
    starts: UInt32[np.ndarray, " latents_plus_1"]
    positions: UInt32[np.ndarray, " n"]
    values: Float32[np.ndarray, " n"]

    @property
    def bytes(self) -> int:
        return self.starts.nbytes + self.positions.nbytes + self.values.nbytes


class RunBuffer:
    """Postings of one coder since the last run."""

    def __init__(self, n_latents: int, block: int = BLOCK) -> None:
        self.n_latents = n_latents
        self._latents = np.empty(block, np.uint32)
        self._positions, self._values = np.empty(block, np.uint32), np.empty(block, np.float32)
        self._filled = 0
        self._blocks: list[_Block] = []

    @property
    def bytes(self) -> int:
        """Memory held now; writing takes some 64 bytes for each posting of `WOVEN` more."""
        return 12 * len(self._latents) + sum(block.bytes for block in self._blocks)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self._filled and not self._blocks

    def add(
        self,
        latents: Integer[np.ndarray, " n"],
        positions: Integer[np.ndarray, " n"],
        values: Float32[np.ndarray, " n"],
    ) -> None:
        """Take postings whose positions (below 2^32) follow those taken before. They are copied."""
        done = 0
        while done < len(latents):
            n = min(len(latents) - done, len(self._latents) - self._filled)
            place, given = slice(self._filled, self._filled + n), slice(done, done + n)
            self._latents[place], self._positions[place] = latents[given], positions[given]
            self._values[place] = values[given]
            self._filled, done = self._filled + n, done + n
            if self._filled == len(self._latents):
                self._sort()

    def _sort(self) -> None:
        if not self._filled:
            return
        latents = self._latents[: self._filled]
        order = stable_order(latents, self.n_latents)
        starts = np.zeros(self.n_latents + 1, np.uint32)
        starts[1:] = np.cumsum(np.bincount(latents, minlength=self.n_latents))
        self._blocks.append(_Block(starts, self._positions[order], self._values[order]))
        self._filled = 0

    def write(self, folder: Path) -> None:
        """Put everything into `folder` as one run, and start empty again."""
        self._sort()
        blocks, self._blocks = self._blocks, []
        starts = np.stack([block.starts for block in blocks])
        with disk_errors(folder):
            folder.mkdir(parents=True)
            save_raw(folder / OFFSETS, starts.sum(axis=0, dtype=np.int64))
            with (folder / POSITIONS).open("wb") as positions, (folder / VALUES).open("wb") as values:
                for first, last in spans(np.diff(starts.sum(axis=0, dtype=np.int64)), len(blocks)):
                    part = starts[:, first : last + 1].astype(np.int64)
                    read = [
                        (block.positions[a:b], block.values[a:b])
                        for block, a, b in zip(blocks, part[:, 0], part[:, -1], strict=True)
                    ]
                    woven = weave(np.diff(part), read)
                    write_raw(positions, woven[0])
                    write_raw(values, woven[1])


def stable_order(latents: UInt32[np.ndarray, " n"], n_latents: int) -> Int64[np.ndarray, " n"]:
    """The stable order by latent. NumPy sorts 16-bit keys by radix in linear time: one pass, or two for wide coders."""
    order = np.argsort(latents.astype(np.uint16), kind="stable")
    if n_latents > 2**16:
        high = (latents >> 16).astype(np.uint16)[order]
        order = order[np.argsort(high, kind="stable")]
    return order


def weave(
    counts: Int64[np.ndarray, "runs latents"], parts: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of several runs as one, latent by latent, in the order of the runs; no loop over latents.

    `counts[i]` says how many of `parts[i]` belong to each latent.
    """
    if len(parts) == 1:
        return parts[0]
    sizes = counts.sum(axis=1)
    sources = counts.cumsum(axis=1)
    sources += (sizes.cumsum() - sizes)[:, None]
    sources -= counts
    lengths = counts.T.reshape(-1)
    shift = sources.T.reshape(-1)
    shift -= lengths.cumsum()
    shift += lengths
    order = np.repeat(shift, lengths)
    order += np.arange(len(order))
    return np.concatenate([part[0] for part in parts])[order], np.concatenate([part[1] for part in parts])[order]


def spans(counts: Int64[np.ndarray, " latents"], runs: int, postings: int = WOVEN) -> Iterator[tuple[int, int]]:
    """Runs of latents `[first, last)` with at most `postings` postings together, or one latent that has more."""
    ends = np.cumsum(counts)
    most = max(WOVEN // max(runs, 1), 1)
    first, done = 0, 0
    while first < len(counts):
        last = int(np.searchsorted(ends, done + postings, side="right"))
        last = min(max(last, first + 1), first + most)
        yield first, last
        first, done = last, int(ends[last - 1])
