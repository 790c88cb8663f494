"""Small functions that kernels share. Triton's language, not Python's: only kernels may call them."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

# `no_type_check` keeps the run-time shape checks of tests away: Triton compiles the source, and knows no wrappers.


@triton.jit
@no_type_check
def row_start(row, width):
    """Where a row of `width` numbers begins, in 64 bits: latents × d and tokens × room pass 2³¹."""
    return row.to(tl.int64) * width


@triton.jit
@no_type_check
def rank_bits(v):
    """float32 as uint32 in the same order: both zeros are equal, NaN (of either sign) lies above everything."""
    bits = tl.where(v == 0.0, 0.0, v).to(tl.uint32, bitcast=True)
    turned = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(v != v, 0xFFFFFFFF, turned).to(tl.uint32)


@triton.jit
@no_type_check
def from_rank_bits(bits):
    """The number whose `rank_bits` these are."""
    turned = tl.where((bits >> 31) != 0, bits & 0x7FFFFFFF, bits ^ 0xFFFFFFFF).to(tl.uint32)
    return turned.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def kth_largest(keys, k, BITS: tl.constexpr):
    """The k-th largest of uint32 keys, exact in its top `BITS` bits and rounded down below them.

    Found bit by bit: as many counts over the block as bits, where a bitonic sort of n numbers takes log²(n)/2 passes.
    """
    found = tl.full([], 0, tl.uint32)
    for i in tl.static_range(BITS):
        trial = found | tl.full([], 1 << (31 - i), tl.uint32)
        reached = tl.sum((keys >= trial).to(tl.int32), 0) >= k
        found = tl.where(reached, trial, found)
    return found


@triton.jit
@no_type_check
def kth_smallest_id(ids, among, k):
    """The k-th smallest of the int32 ids (distinct, at least 0) for which `among` holds."""
    found = tl.full([], 0, tl.int32)
    for i in tl.static_range(31):
        trial = found + (1 << (30 - i))
        below = tl.sum((among & (ids < trial)).to(tl.int32), 0)
        found = tl.where(below < k, trial, found)
    return found


@triton.jit
@no_type_check
def pack(z, ids):
    """One int64: the float32 bits of `z` above, the int32 `ids` below."""
    return (z.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids.to(tl.int64)


@triton.jit
@no_type_check
def packed_value(both):
    """`z` of a packed pair."""
    return (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def packed_id(both):
    """`ids` of a packed pair."""
    return (both & 0xFFFFFFFF).to(tl.int32)


@triton.jit
@no_type_check
def gated(z, scale, HAS_SCALE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """What the selection looks at: the pre-activation, times the gate's factor where there is one, or its size."""
    gate = z
    if HAS_SCALE:
        gate = z * scale
    if MAGNITUDE:
        gate = tl.abs(gate)
    return gate
