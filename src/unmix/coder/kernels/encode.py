"""Encoding by kernels: the k best of each token, or all above a floor, without a `[tokens, latents]` tensor.

Every `STRIDE`-th latent is scored first. From those each token gets a floor that a few times k of its scores should
reach (`rank_of` says how many); the kernel then keeps what does. Tokens that this does not settle, about one in a
thousand, are done by the plain path: the result is exact, for scores multiplied in the inputs' precision and summed in
float32.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.codes import offsets_of
from unmix.coder.kernels import plain
from unmix.coder.kernels.launching import Tiles, interpreted, on_grid, power_of_two, tiles_of
from unmix.coder.kernels.rules import Found, TopRule

STRIDE = 32
"""One latent in so many is scored first, to guess floors: 3 % of the product."""
MISSES = 0.002
"""Share of tokens whose floor may turn out too high."""
LEAST_SAMPLE = 64
"""Latents below which a sample says too little: the plain path then."""


def rank_of(k: int, sample: int, n_latents: int) -> int:
    """Which of a sample's scores, from above, is taken as the floor.

    Of a token's k best a number of about Poisson(k · sample / n_latents) lies in the sample; where as many as the rank
    do, fewer than k reach the floor. The rank is the least that makes this rarer than `MISSES`.
    """
    mean = k * sample / n_latents
    term = left = math.exp(-mean)
    rank = 1
    while 1.0 - left > MISSES and rank < sample:
        term *= mean / rank
        left += term
        rank += 1
    return rank


def room_for(k: int, rank: int, sample: int, n_latents: int) -> int:
    """Candidates that a token has room for: what the rank lets one expect, and four standard deviations on top.

    How many reach the floor is about Gamma-distributed: `rank` times `n_latents / sample`, give or take the root.
    """
    expected = (rank + 4 * math.sqrt(rank)) * n_latents / sample
    return power_of_two(math.ceil(max(expected, k)))


def floors(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, rule: TopRule, rank: int, stride: int
) -> Float[Tensor, " t"]:
    """One float32 floor a token, from every `stride`-th latent."""
    from unmix.coder.kernels.scoring import floor_kernel

    some = W[::stride]
    # Rounded to the inputs' precision, as torch's product is: a floor need not be exact.
    if x.is_cuda:
        scores = torch.addmm(b[::stride].to(x.dtype), x, some.T)
    else:
        scores = plain.product(x, some) + b[::stride]
    sample = scores.shape[1]
    found = torch.empty(len(x), dtype=torch.float32, device=x.device)
    width = power_of_two(sample)
    factor = None if scale is None else scale[::stride].contiguous()
    on_grid(floor_kernel, len(x))(
        scores, factor, found, sample, rank,
        HAS_SCALE=scale is not None, MAGNITUDE=rule.magnitude, POSITIVE=rule.positive and not rule.magnitude,
        N=width, num_warps=1 if width <= 1024 else 4,
    )  # fmt: skip
    return found


def candidates(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, floor: Tensor, capacity: int, per_latent: bool,
    on_scores: bool, magnitude: bool, tiles: Tiles | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What reaches its floor, in any order: `(counts [t] int32, room [t, capacity] int64, value and id packed)`."""
    from unmix.coder.kernels.scoring import score_kernel

    shape = tiles or tiles_of(x.dtype)
    blocks = -(-len(x) // shape.tokens)
    counts = torch.zeros(blocks * shape.tokens, dtype=torch.int32, device=x.device)
    room = torch.empty(blocks * shape.tokens, capacity, dtype=torch.int64, device=x.device)
    on_grid(score_kernel, blocks * -(-W.shape[0] // shape.latents))(
        x, W, b, scale, floor, counts, room, len(x), W.shape[0], x.shape[1], x.stride(0), W.stride(0), capacity,
        PER_LATENT=per_latent, HAS_SCALE=scale is not None, ON_SCORES=on_scores, MAGNITUDE=magnitude,
        UPCAST=interpreted() and x.dtype == torch.bfloat16, EVEN_K=x.shape[1] % shape.inner == 0,
        EVEN_N=W.shape[0] % shape.latents == 0, ASSEMBLED=not interpreted(),
        BM=shape.tokens, BN=shape.latents, BK=shape.inner, GROUP=shape.group,
        **shape.options(),
    )  # fmt: skip
    return counts[: len(x)], room[: len(x)]


def _rows(t: Tensor) -> Tensor:
    """Neighbours in memory along the last dimension, as the kernel reads them."""
    return t if t.stride(-1) == 1 else t.contiguous()


def top_codes(
    x: Float[Tensor, "t d"],
    W: Float[Tensor, "F d"],
    b: Float[Tensor, " F"],
    scale: Float[Tensor, " F"] | None,
    rule: TopRule,
    stride: int = STRIDE,
    tiles: Tiles | None = None,
    floor: Float[Tensor, " t"] | None = None,
    capacity: int | None = None,
) -> Found:
    """Each token's k best in order of latent id, ties to the lowest id; `x` and `W` in one dtype.

    `floor` replaces the sampled guess and `capacity` the room for candidates: neither changes the result.
    """
    t, n_latents, k = len(x), W.shape[0], rule.k
    sample = -(-n_latents // stride)
    offsets = torch.arange(t + 1, device=x.device, dtype=torch.int64) * min(k, n_latents)
    if t == 0 or k >= n_latents or (floor is None and sample < LEAST_SAMPLE):
        ids, z = plain.top(x, W, b, scale, rule)
        return Found(z.reshape(-1), ids.reshape(-1).to(torch.int32), offsets, t)
    x, weights = _rows(x), _rows(W)
    rank = rank_of(k, sample, n_latents)
    if floor is None:
        floor = floors(x, weights, b, scale, rule, rank, stride)
    capacity = capacity or room_for(k, rank, sample, n_latents)
    counts, room = candidates(x, weights, b, scale, floor, capacity, False, False, rule.magnitude, tiles)
    ids, z, again = pick(room, counts, scale, rule)
    # The one look that the host takes at the device: almost always at nothing.
    rows = again.nonzero().squeeze(-1)
    if len(rows):
        more, values = plain.top(x[rows], W, b, scale, rule)
        ids[rows], z[rows] = more.to(torch.int32), values
    return Found(z.view(-1), ids.view(-1), offsets, len(rows))


def pick(room: Tensor, counts: Tensor, scale: Tensor | None, rule: TopRule) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of each token's candidates: `(ids [t, k] int32, z [t, k], unsettled [t] int8)`."""
    from unmix.coder.kernels.selecting import select_kernel

    t, capacity = room.shape
    k = rule.k
    ids = torch.empty(t, k, dtype=torch.int32, device=room.device)
    z = torch.empty(t, k, dtype=torch.float32, device=room.device)
    scratch = torch.empty(t, k, dtype=torch.int64, device=room.device)
    again = torch.empty(t, dtype=torch.int8, device=room.device)
    on_grid(select_kernel, t)(
        room, counts, scale, scratch, ids, z, again, k,
        HAS_SCALE=scale is not None, MAGNITUDE=rule.magnitude, CAPACITY=capacity, K=power_of_two(k),
        num_warps=1 if capacity <= 512 else 4,
    )  # fmt: skip
    return ids, z, again


def threshold_codes(
    x: Float[Tensor, "t d"],
    W: Float[Tensor, "F d"],
    b: Float[Tensor, " F"],
    scale: Float[Tensor, " F"] | None,
    floor: Float[Tensor, " F"] | float,
    on_scores: bool = False,
    capacity: int = 512,
    tiles: Tiles | None = None,
) -> Found:
    """Every pair whose gate (or score, with `on_scores`) lies above the floor, as ragged codes.

    Tokens that fire more than `capacity` latents are done by the plain path.
    """
    least = floor if isinstance(floor, Tensor) else torch.full_like(b, floor, dtype=torch.float32)
    if len(x) == 0:
        return plain.above(x, W, b, scale, least, on_scores)
    from unmix.coder.kernels.selecting import collect_kernel

    x, weights = _rows(x), _rows(W)
    counts, room = candidates(x, weights, b, scale, least, capacity, True, on_scores, False, tiles)
    crowded = (counts > capacity).nonzero().squeeze(-1)
    more = None
    if len(crowded):
        more = plain.above(x[crowded], W, b, scale, least, on_scores)
        # Their own lengths: close to a floor two orders of summation may disagree.
        counts[crowded] = -more.offsets.diff().to(torch.int32)
    offsets = offsets_of(counts.abs().long())
    nnz = int(offsets[-1])
    ids = torch.empty(nnz, dtype=torch.int32, device=x.device)
    z = torch.empty(nnz, dtype=torch.float32, device=x.device)
    widest = power_of_two(max(1, int(counts.max())), 2)
    on_grid(collect_kernel, len(x))(
        room, counts.clamp_min(0), offsets, ids, z, capacity, WIDTH=widest, num_warps=1 if widest <= 256 else 4
    )
    if more is not None:
        _put_in(ids, z, offsets, crowded, more)
    return Found(z, ids, offsets, len(crowded))


def _put_in(ids: Tensor, z: Tensor, offsets: Int[Tensor, " t_plus_1"], rows: Tensor, more: Found) -> None:
    """Write the codes of some rows to their places."""
    lengths = more.offsets.diff()
    within = torch.arange(len(more.z), device=z.device) - more.offsets[:-1].repeat_interleave(lengths)
    places = offsets[:-1][rows].repeat_interleave(lengths) + within
    ids[places], z[places] = more.indices, more.z
