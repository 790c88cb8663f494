"""Kernels of the encoder's scores: the product of all tokens with all latents, of which only candidates are written.

    floor_kernel   from scores against a sample of latents: a number that a few times k of a token's scores should reach
    score_kernel   tiles of `x Wᵀ + b`; entries that reach their floor go to the token's room of `capacity` candidates

A floor is a guess, and costs nothing but time where it is wrong: a token of which fewer than k entries reach it, or
more than there is room for, is counted and done again. Where at least k entries reach the floor, the k-th largest does,
and so every entry that belongs to the top k is among the candidates.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from unmix.coder.kernels.device import from_rank_bits, gated, kth_largest, pack, rank_bits, row_start


@triton.jit
@no_type_check
def floor_kernel(
    sample, factor, floors, n, rank,
    HAS_SCALE: tl.constexpr, MAGNITUDE: tl.constexpr, POSITIVE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`floors[token]`: the `rank`-th largest gate among `sample [tokens, n]`, rounded down to 16 bits."""
    token = tl.program_id(0)
    columns = tl.arange(0, N)
    inside = columns < n
    z = tl.load(sample + row_start(token, n) + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(factor + columns, mask=inside, other=0.0)
    keys = tl.where(inside, rank_bits(gated(z, scale, HAS_SCALE, MAGNITUDE)), 0).to(tl.uint32)
    floor = from_rank_bits(kth_largest(keys, rank, 16))
    if POSITIVE:
        # Zeros of a ReLU are ranked by id and may be many: never candidates. The smallest normal number stands above.
        floor = tl.where(floor > 1.17549435e-38, floor, 1.17549435e-38)
    tl.store(floors + token, floor)


COUNT = tl.constexpr("""{
    .reg .pred short;
    mov.b32 $0, -1;
    setp.lt.f32 short, $1, $2;
    @!short atom.relaxed.gpu.global.add.u32 $0, [$3], 1;
}""")
"""−1 where the gate $1 falls short of the floor $2 (NaN does not); else the number of candidates counted so far at $3.

Nothing here waits for the count to come back, so that those of all of a thread's entries are on their way together.
Triton's own ways are dearer or closed: a scan of the hits costs forty instructions an entry and spills, and an atomic
for each entry of a product's tile does not compile for sm_90 (3.9: an assertion in its layout pass).
"""


PUT = tl.constexpr("""{
    .reg .pred beyond;
    .reg .b32 bits;
    .reg .b64 cell;
    mov.b32 $0, 0;
    setp.ge.u32 beyond, $1, $5;
    @beyond bra DONE;
    mov.b32 bits, $2;
    mad.wide.u32 cell, $1, 8, $4;
    st.global.v2.b32 [cell], {$3, bits};
    DONE:
}""")
"""Puts the bits $2 of a score and its id $3 at the place $1 (−1: nowhere, as all from the room $5 on) from $4 on."""


@triton.jit
@no_type_check
def append(z, gate, least, tokens, latents, counts, mine, capacity, ASSEMBLED: tl.constexpr):
    """Put pairs whose gate reaches the floor into their token's room, and count them."""
    if ASSEMBLED:
        place = tl.inline_asm_elementwise(
            COUNT, "=&r,f,f,l", [gate, least[:, None], (counts + tokens).to(tl.int64)[:, None]],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            PUT, "=&r,r,f,r,l,r", [place, z, latents[None, :], mine.to(tl.int64)[:, None], capacity],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        hit = (gate < least[:, None]) == 0
        ones = hit.to(tl.int32)
        found = tl.sum(ones, 1)
        start = tl.atomic_add(counts + tokens, found, mask=found > 0, sem="relaxed")
        place = start[:, None] + tl.cumsum(ones, 1) - 1
        both = pack(z, tl.broadcast_to(latents[None, :], z.shape))
        tl.store(mine[:, None] + place, both, mask=hit & (place < capacity))


@triton.jit
@no_type_check
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile, as its registers lie."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
@no_type_check
def score_kernel(
    x, w, b, factor, floor, counts, room, n_tokens, n_latents, d, stride_x, stride_w, capacity,
    PER_LATENT: tl.constexpr, HAS_SCALE: tl.constexpr, ON_SCORES: tl.constexpr, MAGNITUDE: tl.constexpr,
    UPCAST: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, ASSEMBLED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile `[BM tokens, BN latents]` a program; candidates are counted and written in any order.

    With `PER_LATENT` the floor is `[latents]` and candidates lie above it; otherwise `[tokens]`, and they reach it
    (NaN does, as in the plain path). `counts` int32 counts all of them, `room […, capacity]` holds as many as it can,
    value and id packed in 64 bits. Both have rows up to a multiple of BM, so that no token needs a mask.
    `ASSEMBLED`: by `COUNT`, which the interpreter does not know.
    """
    # Programs that run at one time share GROUP blocks of tokens and a run of latents, so that L2 serves both.
    tiles_m, tiles_n = tl.cdiv(n_tokens, BM), tl.cdiv(n_latents, BN)
    program = tl.program_id(0)
    first_m = (program // (GROUP * tiles_n)) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    within = program % (GROUP * tiles_n)
    tokens = (first_m + within % height) * BM + tl.arange(0, BM)
    latents = (within // height) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    # Past the end rows are read again from the start: no mask in the loop, and what they give is dropped below.
    xs = x + row_start(tokens % n_tokens, stride_x)[:, None] + ks[None, :]
    ws = w + row_start(latents % n_latents, stride_w)[None, :] + ks[:, None]
    z = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BK):
        if EVEN_K:
            left, right = tl.load(xs), tl.load(ws)
        else:
            left = tl.load(xs, mask=(ks < d - start)[None, :], other=0.0)
            right = tl.load(ws, mask=(ks < d - start)[:, None], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        z = tl.dot(left, right, z, input_precision="ieee")
        xs += BK
        ws += BK
    real = latents < n_latents
    z += tl.load(b + latents, mask=real, other=0.0).to(tl.float32)[None, :]
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(factor + latents, mask=real, other=0.0)[None, :]
    gate = z if ON_SCORES else gated(z, scale, HAS_SCALE, MAGNITUDE)
    if PER_LATENT:
        # Above a floor is the distance to it above zero, in float32 as well; one comparison then serves both modes.
        above = gate > tl.load(floor + latents, mask=real, other=0.0)[None, :]
        gate = tl.where(above & real[None, :], 1.0, -1.0)
        least = tl.zeros([BM], tl.float32)
    else:
        if EVEN_N == 0:
            gate = tl.where(real[None, :], gate, float("-inf"))
        least = tl.load(floor + tokens, mask=tokens < n_tokens, other=float("inf"))
    mine = room + row_start(tokens, capacity)
    # Half by half: the places of one half fit the registers beside the scores, those of all do not.
    left_z, right_z = halves(z, BM, BN)
    left_gate, right_gate = halves(gate, BM, BN)
    first = (within // height) * BN + tl.arange(0, BN // 2)
    append(left_z, left_gate, least, tokens, first, counts, mine, capacity, ASSEMBLED)
    append(right_z, right_gate, least, tokens, first + BN // 2, counts, mine, capacity, ASSEMBLED)
