"""Kernels of one program that hand out what the small functions return. Imported by tests that found Triton."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

from unmix.coder.kernels.device import (
    from_rank_bits,
    kth_largest,
    kth_smallest_id,
    pack,
    packed_id,
    packed_value,
    rank_bits,
    row_start,
)


@triton.jit
def starts(rows, width, out, N: tl.constexpr):
    """`row_start` of int32 rows."""
    i = tl.arange(0, N)
    tl.store(out + i, row_start(tl.load(rows + i), width))


@triton.jit
def ranks(numbers, keys, back, N: tl.constexpr):
    """Keys of numbers as int64, and the numbers again."""
    i = tl.arange(0, N)
    found = rank_bits(tl.load(numbers + i))
    tl.store(keys + i, found.to(tl.int64))
    tl.store(back + i, from_rank_bits(found))


@triton.jit
def borders(numbers, ids, k, value, smallest, N: tl.constexpr):
    """The k-th largest number, and the k-th smallest id among those above zero."""
    i = tl.arange(0, N)
    v = tl.load(numbers + i)
    tl.store(value, from_rank_bits(kth_largest(rank_bits(v), k, 32)))
    tl.store(smallest, kth_smallest_id(tl.load(ids + i), v > 0.0, k))


@triton.jit
def packing(numbers, ids, value, back, N: tl.constexpr):
    """There and back."""
    i = tl.arange(0, N)
    both = pack(tl.load(numbers + i), tl.load(ids + i))
    tl.store(value + i, packed_value(both))
    tl.store(back + i, packed_id(both))
