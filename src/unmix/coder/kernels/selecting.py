"""Kernels that turn a token's candidates into its codes: the exact k best, or all of them, in order of latent id."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from unmix.coder.kernels.device import (
    gated,
    kth_largest,
    kth_smallest_id,
    packed_id,
    packed_value,
    rank_bits,
    row_start,
)

LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""Sorts behind every pair."""


@triton.jit
@no_type_check
def select_kernel(
    room, counts, factor, scratch, ids_out, z_out, again, k,
    HAS_SCALE: tl.constexpr, MAGNITUDE: tl.constexpr, CAPACITY: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The k largest gates of a token's candidates, the lowest ids among equals: `ids_out`, `z_out [tokens, k]`.

    A program a token. `again[token]` is 1, and nothing is written, where the candidates do not settle it. The result
    does not depend on the order of the candidates. `CAPACITY` and `K` (at least k) are powers of two.
    """
    token = tl.program_id(0)
    n = tl.load(counts + token)
    unsettled = (n < k) | (n > CAPACITY)
    tl.store(again + token, unsettled.to(tl.int8))
    if unsettled == 0:
        slots = tl.arange(0, CAPACITY)
        held = slots < n
        mine = room + row_start(token, CAPACITY)
        both = tl.load(mine + slots, mask=held, other=0)
        ids = packed_id(both)
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(factor + ids, mask=held, other=0.0)
        keys = rank_bits(gated(packed_value(both), scale, HAS_SCALE, MAGNITUDE))
        keys = tl.where(held, keys, 0).to(tl.uint32)
        border = kth_largest(keys, k, 32)
        above = held & (keys > border)
        equal = held & (keys == border)
        left = k - tl.sum(above.to(tl.int32), 0)
        if tl.sum(equal.to(tl.int32), 0) > left:
            equal = equal & (ids <= kth_smallest_id(ids, equal, left))
        keep = above | equal
        place = tl.cumsum(keep.to(tl.int32), 0) - 1
        # Registers cannot be compacted: through memory, and back as a block of k.
        row = row_start(token, k)
        tl.store(scratch + row + place, (ids.to(tl.int64) << 32) | slots, mask=keep)
        tl.debug_barrier()
        best = tl.arange(0, K)
        ordered = tl.sort(tl.load(scratch + row + best, mask=best < k, other=LAST))
        z = packed_value(tl.load(mine + (ordered & 0xFFFFFFFF), mask=best < k, other=0))
        tl.store(ids_out + row + best, (ordered >> 32).to(tl.int32), mask=best < k)
        tl.store(z_out + row + best, z, mask=best < k)


@triton.jit
@no_type_check
def collect_kernel(room, counts, offsets, ids_out, z_out, capacity, WIDTH: tl.constexpr):
    """All candidates of a token in order of id, to `offsets[token]` on; tokens with more than `WIDTH` are left out."""
    token = tl.program_id(0)
    n = tl.load(counts + token)
    if n <= WIDTH:
        slots = tl.arange(0, WIDTH)
        mine = room + row_start(token, capacity)
        both = tl.load(mine + slots, mask=slots < n, other=0)
        keys = tl.where(slots < n, (packed_id(both).to(tl.int64) << 32) | slots, LAST)
        ordered = tl.sort(keys)
        z = packed_value(tl.load(mine + (ordered & 0xFFFFFFFF), mask=slots < n, other=0))
        start = tl.load(offsets + token)
        tl.store(ids_out + start + slots, (ordered >> 32).to(tl.int32), mask=slots < n)
        tl.store(z_out + start + slots, z, mask=slots < n)
