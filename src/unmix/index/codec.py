"""Ascending positions in few bits: blocks of 128, each its first position and the gaps after it, packed.

A *row* is the posting list of one latent in one segment. It is cut into blocks of 128 postings, the last of which may
be shorter. Of a block are kept the first position (u32), a width w in bits (u8, 0 to 32), and each later position's
distance to the one before it, less 1, in w bits, lowest bit first; the next block begins at the next whole byte.
Where a block's bytes begin follows from the widths before it. Nothing here loops over blocks or rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

BLOCK = 128
PADDING = 8
"""Bytes after the last packed one that a reader may look at: gaps are read as unaligned 64-bit words."""
RUN = 2**16
"""Postings packed in one go: the dozen arrays of that length stay in a core's cache."""
MAX_WIDTH = 32
_MASKS = np.array([(1 << width) - 1 for width in range(MAX_WIDTH + 1)], np.uint64)


@dataclass(frozen=True)
class Packed:
    """Blocks of positions; `data` holds their packed gaps one after another."""

    firsts: UInt32[np.ndarray, " blocks"]
    widths: UInt8[np.ndarray, " blocks"]
    data: UInt8[np.ndarray, " bytes"]


def block_counts(counts: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Blocks of each row."""
    return -(-counts // BLOCK)


def block_sizes(counts: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " blocks"]:
    """Postings in each block of rows with the given numbers of postings."""
    blocks = block_counts(counts)
    sizes = np.full(int(blocks.sum()), BLOCK, np.int64)
    alive = counts > 0
    sizes[(np.cumsum(blocks) - 1)[alive]] = (counts - (blocks - 1) * BLOCK)[alive]
    return sizes


def block_bytes(widths: UInt8[np.ndarray, " blocks"], sizes: Int64[np.ndarray, " blocks"]) -> Int64[np.ndarray, " b"]:
    """Bytes of each block's packed gaps."""
    return ((sizes - 1) * widths + 7) >> 3


def encode(positions: UInt32[np.ndarray, " n"], sizes: Int64[np.ndarray, " blocks"]) -> Packed:
    """Pack positions that ascend inside every block; `sizes` (1 to 128 each) say where blocks end."""
    ends = np.cumsum(sizes)
    runs: list[Packed] = []
    first = begin = 0
    while first < len(sizes):
        last = max(int(np.searchsorted(ends, begin + RUN, "right")), first + 1)
        end = int(ends[last - 1])
        runs.append(_encode_run(positions[begin:end], sizes[first:last]))
        first, begin = last, end
    if len(runs) == 1:
        return runs[0]
    return Packed(
        np.concatenate([run.firsts for run in runs] or [np.empty(0, np.uint32)]),
        np.concatenate([run.widths for run in runs] or [np.empty(0, np.uint8)]),
        np.concatenate([run.data for run in runs] or [np.empty(0, np.uint8)]),
    )


def _encode_run(positions: UInt32[np.ndarray, " n"], sizes: Int64[np.ndarray, " blocks"]) -> Packed:
    starts = np.cumsum(sizes) - sizes
    gaps = np.diff(positions, prepend=positions[:1]) - np.uint32(1)
    gaps[starts] = 0
    widths = np.frexp(np.maximum.reduceat(gaps, starts).astype(np.float64))[1].astype(np.uint8)
    length = block_bytes(widths, sizes)
    bits = _bit_offsets(np.cumsum(length) - length, starts, sizes, widths.astype(np.int64))
    words = bits >> 6
    bits &= 63
    shift = bits.view(np.uint64)
    gaps = gaps.astype(np.uint64)
    # Each 64-bit word is the OR of the gaps that begin in it, and of the rest of the one that ran over from before.
    heads = np.flatnonzero(np.diff(words, prepend=-1))
    tails = np.append(heads[1:], len(gaps)) - 1
    total = int(length.sum())
    packed = np.zeros(int(words[-1]) + 2, "<u8")
    packed[words[heads]] = np.bitwise_or.reduceat(gaps << shift, heads)
    packed[words[tails] + 1] |= (gaps[tails] >> np.uint64(1)) >> (np.uint64(63) - shift[tails])
    return Packed(positions[starts], widths, packed.view(np.uint8)[:total])


def decode(
    firsts: Int64[np.ndarray, " blocks"],
    widths: UInt8[np.ndarray, " blocks"],
    sizes: Int64[np.ndarray, " blocks"],
    data: UInt8[np.ndarray, " bytes"],
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " blocks"]]:
    """`(positions, last position of each block)`; firsts may have a base added, and positions then have it too.

    `data` holds exactly these blocks' bytes and `PADDING` more of any content. Widths must be at most 32 and the
    length right, which is the caller's to check; then nothing is read outside, whatever the bytes are.
    """
    ends = np.cumsum(sizes)
    positions = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
    if 0 < len(positions) <= RUN:
        return positions, _decode_run(firsts, widths, sizes, data, positions)
    byte_ends = np.cumsum(block_bytes(widths, sizes))
    lasts = np.empty(len(sizes), np.int64)
    first = begin = byte = 0
    while first < len(sizes):
        last = max(int(np.searchsorted(ends, begin + RUN, "right")), first + 1)
        end, run = int(ends[last - 1]), slice(first, last)
        out = positions[begin:end]
        lasts[run] = _decode_run(firsts[run], widths[run], sizes[run], data[byte:], out)
        first, begin, byte = last, end, int(byte_ends[last - 1])
    return positions, lasts


def _decode_run(
    firsts: Int64[np.ndarray, " blocks"],
    widths: UInt8[np.ndarray, " blocks"],
    sizes: Int64[np.ndarray, " blocks"],
    data: UInt8[np.ndarray, " bytes"],
    out: Int64[np.ndarray, " n"],
) -> Int64[np.ndarray, " blocks"]:
    starts = np.cumsum(sizes) - sizes
    length = block_bytes(widths, sizes)
    bits = _bit_offsets(np.cumsum(length) - length, starts, sizes, widths.astype(np.int64))
    # One 64-bit word from every byte on: 32 bits at any bit offset lie in the one that begins at their first byte.
    unaligned = np.ndarray(len(data) - PADDING + 1, "<u8", data, strides=(1,))
    gaps = unaligned[bits >> 3]
    bits &= 7
    gaps >>= bits.view(np.uint64)
    gaps &= np.repeat(_MASKS[widths], sizes)
    steps = gaps.view(np.int64)
    steps += 1
    # One cumulative sum runs through all blocks: each block's first step leads from the last position before it.
    steps[starts] = 0
    lasts = firsts + np.add.reduceat(steps, starts)
    steps[starts] = firsts
    steps[starts[1:]] -= lasts[:-1]
    np.cumsum(steps, out=out)
    return lasts


def _bit_offsets(
    begin: Int64[np.ndarray, " blocks"],
    starts: Int64[np.ndarray, " blocks"],
    sizes: Int64[np.ndarray, " blocks"],
    widths: Int64[np.ndarray, " blocks"],
) -> Int64[np.ndarray, " n"]:
    """Bit at which each posting's gap begins; that of a block's first posting, which has none, is its block's."""
    bits = np.arange(int(sizes.sum()))
    bits *= np.repeat(widths, sizes)
    bits += np.repeat(8 * begin - (starts + 1) * widths, sizes)
    bits[starts] = 8 * begin
    return bits
