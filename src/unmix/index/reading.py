"""From a segment's files back to postings, checking all that is taken: structure always, hashes are `verify`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float16, Float32, Int64, UInt8, UInt32

from unmix.index.codec import BLOCK, MAX_WIDTH, PADDING, block_bytes, block_sizes, decode
from unmix.index.halves import LARGEST, from_half, strengths, top_strengths
from unmix.index.layout import POSITIONS, VALUES
from unmix.index.part import Part
from unmix.index.segment import BLOCKS, Row, SegmentReader

Place = Callable[[int], tuple[SegmentReader, int]]
"""Row → its segment and latent, for messages."""


@dataclass(frozen=True)
class Stored:
    """Blocks as stored, out of one or more segments. A row is a whole latent, or some blocks of one."""

    counts: Int64[np.ndarray, " rows"]
    blocks: Int64[np.ndarray, " rows"]
    bytes: Int64[np.ndarray, " rows"]
    ends: Int64[np.ndarray, " rows"]
    """Global position at which the row's segment ends."""
    firsts: Int64[np.ndarray, " blocks"]
    """Global."""
    widths: UInt8[np.ndarray, " blocks"]
    peaks: Float16[np.ndarray, " blocks"]
    sizes: Int64[np.ndarray, " blocks"]
    data: UInt8[np.ndarray, " bytes"]
    half: Float16[np.ndarray, " n"]
    place: Place

    def refuse(self, wrong: np.ndarray, file: str, found: str) -> None:
        """`CorruptError` for the latent of the first wrong block, if there is one."""
        if wrong.any():
            row = int(np.searchsorted(np.cumsum(self.blocks), int(np.argmax(wrong)), "right"))
            segment, latent = self.place(row)
            raise segment.corrupt(file, latent, found)


def unpack(stored: Stored, one_latent: bool) -> Int64[np.ndarray, " n"]:
    """Global positions; `CorruptError` where widths, positions or values cannot be what was written."""
    if not len(stored.sizes):
        return np.empty(0, np.int64)
    block_ends, alive = np.cumsum(stored.blocks), stored.blocks > 0
    heads, tails = (block_ends - stored.blocks)[alive], (block_ends - 1)[alive]
    stored.refuse(stored.widths > MAX_WIDTH, BLOCKS, f"gaps of more than {MAX_WIDTH} bits")
    wrong = np.zeros(len(stored.sizes), bool)
    wrong[heads] = np.add.reduceat(block_bytes(stored.widths, stored.sizes), heads) != stored.bytes[alive]
    stored.refuse(wrong, BLOCKS, "widths that do not add up to the bytes of its gaps")
    positions, lasts = decode(stored.firsts, stored.widths, stored.sizes, stored.data)
    wrong = np.append(False, stored.firsts[1:] <= lasts[:-1])
    if not one_latent:
        wrong[heads] = False
    wrong[tails] |= lasts[tails] >= stored.ends[alive]
    stored.refuse(wrong, POSITIONS, "positions that do not ascend inside the segment")
    _check_values(stored)
    return positions


def _check_values(stored: Stored) -> None:
    bits, starts = strengths(stored.half), np.cumsum(stored.sizes) - stored.sizes
    wrong = np.maximum.reduceat(bits, starts) != strengths(stored.peaks)
    stored.refuse(wrong, VALUES, f"values whose largest is not the one in {BLOCKS}")
    if not bits.all():
        stored.refuse(np.minimum.reduceat(bits, starts) == 0, VALUES, "a value of 0")


def read_rows(segment: SegmentReader, first: int, last: int, whole: Float32[np.ndarray, " latents"]) -> Part:
    """The postings of latents `[first, last)` in one segment; `whole`: each one's max |value| over all segments."""
    offsets = segment.rows(first, last)
    (posting, block, byte), (posting_end, block_end, byte_end) = offsets[0].tolist(), offsets[-1].tolist()
    counts, blocks, lengths = np.ascontiguousarray(np.diff(offsets, axis=0).T)
    stored = Stored(
        counts, blocks, lengths, np.full(last - first, segment.base + segment.tokens),
        segment.firsts[block:block_end].astype(np.int64) + segment.base, segment.widths[block:block_end],
        segment.peaks[block:block_end], block_sizes(counts), segment.packed[byte : byte_end + PADDING],
        segment.values[posting:posting_end], lambda row: (segment, first + row),
    )  # fmt: skip
    own = segment.maxima[first:last]
    check_maxima(stored.place, stored.peaks, blocks, own)
    positions = unpack(stored, one_latent=False)
    return Part(counts, positions, from_half(stored.half, counts, own, whole))


def check_maxima(
    place: Place,
    peaks: Float16[np.ndarray, " blocks"],
    blocks: Int64[np.ndarray, " rows"],
    own: Float32[np.ndarray, " rows"],
) -> None:
    """`CorruptError` where a row's largest block maximum is not its maximum in the segment."""
    alive = np.flatnonzero(blocks)
    if not len(alive):
        return
    highest = np.maximum.reduceat(strengths(peaks), (np.cumsum(blocks) - blocks)[alive])
    wrong = (highest != top_strengths(own[alive])) | (highest > LARGEST)
    if wrong.any():
        row = int(alive[np.argmax(wrong)])
        segment, latent = place(row)
        raise segment.corrupt(BLOCKS, latent, f"maximum {own[row]:g}, which none of its blocks has")


@dataclass(frozen=True)
class Piece:
    """Some blocks of one latent in one segment, ascending, as stored."""

    segment: SegmentReader
    firsts: UInt32[np.ndarray, " blocks"]
    widths: UInt8[np.ndarray, " blocks"]
    peaks: Float16[np.ndarray, " blocks"]
    sizes: Int64[np.ndarray, " blocks"]
    data: UInt8[np.ndarray, " bytes"]
    half: Float16[np.ndarray, " n"]


@dataclass(frozen=True)
class Span:
    """All of one latent in one segment."""

    segment: SegmentReader
    latent: int
    row: Row

    @property
    def blocks(self) -> slice:
        """Its blocks in the segment's."""
        return slice(self.row.block, self.row.block + self.row.blocks)

    def whole(self) -> Piece:
        """Every block: slices of the memory maps."""
        segment, row, blocks = self.segment, self.row, self.blocks
        return Piece(
            segment, segment.firsts[blocks], segment.widths[blocks], segment.peaks[blocks],
            block_sizes(np.array([row.count])), segment.packed[row.byte : row.byte + row.bytes],
            segment.values[row.posting : row.posting + row.count],
        )  # fmt: skip

    def pick(self, wanted: Int64[np.ndarray, " m"]) -> Piece:
        """Some blocks, by ascending number inside the row. Costs these blocks, and a glance at each one's width."""
        if len(wanted) == self.row.blocks:
            return self.whole()
        segment, row = self.segment, self.row
        widths, sizes = segment.widths[self.blocks], block_sizes(np.array([row.count]))
        lengths = block_bytes(widths, sizes)
        ends = np.cumsum(lengths)
        if widths.max() > MAX_WIDTH or ends[-1] != row.bytes:
            found = f"widths up to {widths.max()} bits that make {ends[-1]} bytes of gaps, not {row.bytes}"
            raise segment.corrupt(BLOCKS, self.latent, found)
        lengths, sizes, blocks = lengths[wanted], sizes[wanted], wanted + row.block
        data = places(row.byte + ends[wanted] - lengths, lengths)
        return Piece(
            segment, segment.firsts[blocks], widths[wanted], segment.peaks[blocks], sizes, segment.packed[data],
            self._halves(wanted),
        )  # fmt: skip

    def _halves(self, wanted: Int64[np.ndarray, " m"]) -> Float16[np.ndarray, " n"]:
        """The values of some blocks. Whole blocks are rows of a matrix: copied 256 bytes at a time."""
        full, rest = divmod(self.row.count, BLOCK)
        values = self.segment.values[self.row.posting : self.row.posting + self.row.count]
        short = rest and wanted[-1] == full
        rows = values[: full * BLOCK].reshape(full, BLOCK)[wanted[: len(wanted) - bool(short)]].reshape(-1)
        return np.concatenate([rows, values[full * BLOCK :]]) if short else rows


def places(starts: Int64[np.ndarray, " m"], lengths: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " n"]:
    """The numbers of the ranges of these lengths from these starts on, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


@dataclass(frozen=True)
class Rows:
    """One latent over all segments in which it fires."""

    latent: int
    spans: list[Span]
    own: Float32[np.ndarray, " spans"]
    """max |value| in each of the segments."""
    peaks: Float16[np.ndarray, " blocks"]

    @classmethod
    def of(cls, segments: Sequence[SegmentReader], latent: int) -> Rows:
        """Where the latent lies; `CorruptError` where that cannot be."""
        spans = [Span(segment, latent, segment.row(latent)) for segment in segments]
        spans = [span for span in spans if span.row.count]
        own = np.array([span.segment.maxima[latent] for span in spans], np.float32)
        peaks = np.concatenate([np.empty(0, np.float16), *(span.segment.peaks[span.blocks] for span in spans)])
        blocks = np.array([span.row.blocks for span in spans], np.int64)
        check_maxima(lambda row: (spans[row].segment, latent), peaks, blocks, own)
        return cls(latent, spans, own, peaks)

    @property
    def count(self) -> int:
        """Postings."""
        return sum(span.row.count for span in self.spans)

    def whole(self) -> list[Piece]:
        """Every block."""
        return [span.whole() for span in self.spans]

    def read(self, pieces: Sequence[Piece]) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Global positions, ascending, and values of some blocks."""
        if not pieces:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        stored = _collect(self.latent, pieces)
        own = np.array([piece.segment.maxima[self.latent] for piece in pieces], np.float32)
        whole = np.full(len(pieces), self.own.max())
        return unpack(stored, one_latent=True), from_half(stored.half, stored.counts, own, whole)

    def peaking(self, at_least: int) -> list[Piece]:
        """The blocks that can hold one of the `at_least` (1 or more) strongest postings."""
        if len(self.peaks) <= at_least:
            return self.whole()
        blocks = np.array([span.row.blocks for span in self.spans])
        peaks = from_half(self.peaks, blocks, self.own, np.full(len(blocks), self.own.max()))
        wanted = np.flatnonzero(peaks >= np.partition(peaks, -at_least)[-at_least])
        ends = np.cumsum(blocks)
        cuts = np.searchsorted(wanted, np.append(0, ends)).tolist()
        starts = (ends - blocks).tolist()
        return [
            span.pick(wanted[first:last] - start)
            for span, start, (first, last) in zip(self.spans, starts, pairwise(cuts), strict=True)
            if last > first
        ]

    def reaching(self, begins: Int64[np.ndarray, " m"], ends: Int64[np.ndarray, " m"]) -> list[Piece]:
        """The blocks that can hold a position of one of the ascending, separate ranges `[begin, end)`."""
        found: list[Piece] = []
        for span in self.spans:
            base = span.segment.base
            low, high = np.searchsorted(ends, base, "right"), np.searchsorted(begins, base + span.segment.tokens)
            if low >= high:
                continue
            firsts = span.segment.firsts[span.blocks].astype(np.int64) + base
            # A range can begin inside the block before the first one that starts in it.
            first = np.maximum(np.searchsorted(firsts, begins[low:high], "right") - 1, 0)
            last = np.searchsorted(firsts, ends[low:high])
            steps = np.bincount(first, minlength=len(firsts) + 1)
            steps -= np.bincount(np.maximum(last, first), minlength=len(firsts) + 1)
            wanted = np.flatnonzero(np.cumsum(steps[:-1]))
            if len(wanted):
                found.append(span.pick(wanted))
        return found


def _collect(latent: int, pieces: Sequence[Piece]) -> Stored:
    numbers = [(len(p.half), len(p.sizes), len(p.data), p.segment.base, p.segment.tokens) for p in pieces]
    counts, blocks, lengths, bases, tokens = np.ascontiguousarray(np.array(numbers, np.int64).T)
    firsts = np.concatenate([piece.firsts for piece in pieces]).astype(np.int64)
    return Stored(
        counts, blocks, lengths, bases + tokens, firsts + np.repeat(bases, blocks),
        np.concatenate([piece.widths for piece in pieces]), np.concatenate([piece.peaks for piece in pieces]),
        np.concatenate([piece.sizes for piece in pieces]),
        np.concatenate([*(piece.data for piece in pieces), np.zeros(PADDING, np.uint8)]),
        np.concatenate([piece.half for piece in pieces]), lambda row: (pieces[row].segment, latent),
    )  # fmt: skip
