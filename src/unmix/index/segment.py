"""One segment of one coder: immutable latent-major postings of a run of token positions, and its own manifest.

blocks.bin     one after another, in one file so that an open segment holds few file descriptors:
    offsets    u64 [F + 1, 3]   where each latent's postings, blocks and packed bytes begin; then where all end
    maxima     f32 [F]          max |value| of each latent here, exact; 0 where it never fires
    firsts     u32 [blocks]     first position of each block (positions count from the segment's base)
    peaks      f16 [blocks]     largest |value| of the block as stored: which blocks can hold a latent's strongest
    widths     u8  [blocks]     bits of each of its gaps (`codec.py`)
positions.bin  packed gaps of all blocks, then 8 bytes of padding
values.bin     f16 [postings]   (`halves.py`)
manifest.json  kind "segment", last
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from jaxtyping import Float16, Float32, Int64, UInt8, UInt32, UInt64

from unmix.core.atomic import disk_errors
from unmix.core.errors import CorruptError, DataError
from unmix.core.manifest import write_manifest
from unmix.index.codec import BLOCK, PADDING, block_bytes, block_counts, block_sizes, encode
from unmix.index.halves import maxima, strengths, to_half
from unmix.index.layout import POSITIONS, VALUES, open_raw, write_raw
from unmix.index.part import Part

SEGMENT_KIND = "segment"
BLOCKS = "blocks.bin"
FIRSTS, PEAKS, WIDTHS = _PARTS = ("firsts.part", "peaks.part", "widths.part")
"""What becomes the end of `blocks.bin`; gone when the segment is whole."""
POSTING, BLOCK_NUMBER, BYTE = range(3)
"""Columns of the offsets."""


class SegmentWriter:
    """Writes one segment, latent by latent; holds 28 bytes a latent and what one `write` needs, never the postings.

    `write` takes ascending runs of latents, all postings of each at once; latents that no run holds never fire.
    A segment is whole when `close` has written its manifest. As a context manager it closes on success only.

    Args:
        folder: made here; must not exist.
        base: global position that the segment begins at.
        tokens: positions that it covers, at most 2^32.
        n_latents: latents of the coder.
    """

    def __init__(self, folder: Path, base: int, tokens: int, n_latents: int) -> None:
        self.folder, self.base, self.tokens, self.n_latents = folder, base, tokens, n_latents
        self._offsets = np.zeros((n_latents + 1, 3), np.uint64)
        self._maxima = np.zeros(n_latents, np.float32)
        self._done = 0
        self._ends = np.zeros(3, np.int64)
        with disk_errors(folder), ExitStack() as stack:
            folder.mkdir(parents=True)
            self._files: dict[str, BinaryIO] = {
                name: stack.enter_context((folder / name).open("wb")) for name in (*_PARTS, POSITIONS, VALUES)
            }
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def write(self, first: int, part: Part) -> None:
        """Take every posting of latents `[first, first + len(part.counts))`.

        Raises:
            DataError: latents out of order or past the coder's, positions that do not ascend or lie outside.
        """
        local = self._local(first, part)
        sizes = block_sizes(part.counts)
        largest = maxima(part.values, part.counts)
        values = to_half(part.values, part.counts, largest)
        packed = encode(local, sizes)
        with disk_errors(self.folder):
            write_raw(self._files[FIRSTS], packed.firsts)
            write_raw(self._files[WIDTHS], packed.widths)
            write_raw(self._files[PEAKS], _peaks(values, sizes))
            write_raw(self._files[POSITIONS], packed.data)
            write_raw(self._files[VALUES], values)
        last = first + len(part.counts)
        blocks = np.cumsum(block_counts(part.counts))
        data_ends = np.append(0, np.cumsum(block_bytes(packed.widths, sizes)))[blocks]
        self._offsets[self._done : first + 1] = self._ends
        ends = self._ends + np.stack([np.cumsum(part.counts), blocks, data_ends], axis=1)
        self._offsets[first + 1 : last + 1] = ends
        self._maxima[first:last] = largest
        self._done = last
        if len(ends):
            self._ends = ends[-1]

    def close(self) -> None:
        """Write what remains and then the manifest; a second call does nothing."""
        if self._files[VALUES].closed:
            return
        self._offsets[self._done :] = self._ends
        with disk_errors(self.folder):
            write_raw(self._files[POSITIONS], np.zeros(PADDING, np.uint8))
            self._stack.close()
            with (self.folder / BLOCKS).open("wb") as blocks:
                write_raw(blocks, self._offsets)
                write_raw(blocks, self._maxima)
                for name in _PARTS:
                    with (self.folder / name).open("rb") as part:
                        shutil.copyfileobj(part, blocks)
                    (self.folder / name).unlink()
            write_manifest(
                self.folder, SEGMENT_KIND, [BLOCKS, POSITIONS, VALUES], base=self.base, tokens=self.tokens,
                n_latents=self.n_latents, postings=int(self._ends[POSTING]), blocks=int(self._ends[BLOCK_NUMBER]),
            )  # fmt: skip

    def abandon(self) -> None:
        """Close the files and leave the folder without a manifest."""
        self._stack.close()

    def _local(self, first: int, part: Part) -> UInt32[np.ndarray, " n"]:
        last = first + len(part.counts)
        if not self._done <= first <= last <= self.n_latents:
            expected = f"a run from {self._done} on, up to {self.n_latents}"
            raise DataError(f"{self.folder}: got latents {first} to {last}, expected {expected}")
        local = part.positions - self.base
        wrong = np.diff(local, prepend=-1) <= 0
        wrong[(np.cumsum(part.counts) - part.counts)[part.counts > 0]] = False
        wrong |= (local < 0) | (local >= self.tokens)
        if wrong.any():
            place = int(np.argmax(wrong))
            latent = first + int(np.searchsorted(np.cumsum(part.counts), place, "right"))
            raise DataError(
                f"{self.folder}: latent {latent} has position {part.positions[place]}, expected ascending positions "
                f"from {self.base} to {self.base + self.tokens - 1}"
            )
        return local.astype(np.uint32)


def _peaks(values: Float16[np.ndarray, " n"], sizes: Int64[np.ndarray, " blocks"]) -> Float16[np.ndarray, " blocks"]:
    if not len(sizes):
        return np.empty(0, np.float16)
    return np.maximum.reduceat(strengths(values), np.cumsum(sizes) - sizes).view(np.float16)


@dataclass(frozen=True)
class Row:
    """Where one latent's postings lie in a segment: its first posting, block and packed byte, and how many of each."""

    posting: int
    block: int
    byte: int
    count: int
    blocks: int
    bytes: int


class SegmentReader:
    """Memory maps of one segment. Opening checks that the files' lengths agree with the offsets and no more.

    What is taken from the files is checked where it is taken (`row` here, `reading.py`), so that a broken file gives
    a `CorruptError` that names file and latent, and never a read outside.
    """

    def __init__(self, folder: Path, base: int, tokens: int, n_latents: int) -> None:
        self.folder, self.base, self.tokens, self.n_latents = folder, base, tokens, n_latents
        path = folder / BLOCKS
        head, rest = 24 * (n_latents + 1), 4 * n_latents
        size = path.stat().st_size if path.is_file() else 0
        raw: UInt8[np.ndarray, " bytes"] = open_raw(path, np.uint8, (max(size, head + rest),))
        self.offsets: UInt64[np.ndarray, "latents_plus_1 3"] = raw[:head].view(np.uint64).reshape(-1, 3)
        self.postings, self.blocks, self.bytes = self.offsets[-1].tolist()
        if size != head + rest + 7 * self.blocks or max(self.postings, self.bytes) >= 2**48:
            ends = f"{self.postings} postings in {self.blocks} blocks and {self.bytes} bytes"
            raise CorruptError(f"{path}: found {size} bytes, which do not fit the {ends} that it speaks of")
        maxima, firsts, peaks, widths = np.split(raw[head:], np.cumsum([rest, 4 * self.blocks, 2 * self.blocks]))
        self.maxima: Float32[np.ndarray, " latents"] = maxima.view(np.float32)
        self.firsts: UInt32[np.ndarray, " blocks"] = firsts.view(np.uint32)
        self.peaks: Float16[np.ndarray, " blocks"] = peaks.view(np.float16)
        self.widths: UInt8[np.ndarray, " blocks"] = widths
        self.packed: UInt8[np.ndarray, " bytes"] = open_raw(folder / POSITIONS, np.uint8, (self.bytes + PADDING,))
        self.values: Float16[np.ndarray, " postings"] = open_raw(folder / VALUES, np.float16, (self.postings,))

    def row(self, latent: int) -> Row:
        """Where a latent's postings lie; `CorruptError` where that is not inside the segment."""
        (posting, block, byte), (posting_end, block_end, byte_end) = self.offsets[latent : latent + 2].tolist()
        row = Row(posting, block, byte, posting_end - posting, block_end - block, byte_end - byte)
        fits = posting_end <= self.postings and block_end <= self.blocks and byte_end <= self.bytes
        if not fits or row.count < 0 or row.bytes < 0 or row.blocks != -(-row.count // BLOCK):
            found = f"postings {posting} to {posting_end} in blocks {block} to {block_end}, bytes {byte} to {byte_end}"
            raise self.corrupt(BLOCKS, latent, f"{found}, of {self.postings}, {self.blocks}, {self.bytes}")
        return row

    def counts(self) -> Int64[np.ndarray, " latents"]:
        """Postings of each latent; `CorruptError` as `row`."""
        return np.diff(self.rows(0, self.n_latents)[:, POSTING])

    def rows(self, first: int, last: int) -> Int64[np.ndarray, "latents_plus_1 3"]:
        """The offsets of latents `[first, last)`, checked as `row` does."""
        offsets = self.offsets[first : last + 1].astype(np.int64)
        counts, blocks, lengths = np.diff(offsets, axis=0).T
        past = (offsets[1:] > [self.postings, self.blocks, self.bytes]).any(axis=1)
        wrong = past | (counts < 0) | (lengths < 0) | (blocks != block_counts(counts)) | (offsets[:-1] < 0).any(axis=1)
        if wrong.any():
            self.row(first + int(np.argmax(wrong)))
        return offsets

    def corrupt(self, file: str, latent: int, found: str) -> CorruptError:
        """The error for one latent's share of one file."""
        return CorruptError(f"{self.folder / file}: latent {latent} has {found}; run `unmix verify` on the index")
