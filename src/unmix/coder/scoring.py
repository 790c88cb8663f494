"""Scores in bfloat16, for selections certified to be those of the float32 path.

Where the processor multiplies bfloat16 in hardware, the product of all tokens with all latents takes half the time. It
only finds *candidates*. What float32 rounds differently is bounded, not hoped for:

    |z − z̃| ≤ ‖x − x̃‖·‖W_j‖ + ‖x̃‖·‖W_j − W̃_j‖ + accumulation + rounding of the output     (`Margins.screen`)

so entries whose bfloat16 score falls short of the k-th largest by more than both are off are in no row's top k. The
candidates (1.5 to 2 k of them) are scored again in float32, and the k best are taken where they stand out from the
others by more than float32 itself can be off, for any order of summation (`Margins.round_off`). Close calls are weighed
once more in float64 (`Screen.weigh`), and what stays undecided, ties among them, by float32 products of just those
rows and latents, which sum as the product of all does. Rows with too many close calls take the float32 path whole.
Selected latents are therefore those of the float32 path; values are float32 dot products, equal to that path's up to
their rounding.

Which rows take which way depends on the data alone, never on the clock: a run repeated on the machine is bit-identical.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scoring = Literal["auto", "exact", "bfloat16"]

UNIT = 2.0**-24
"""Unit round-off of float32."""
SLACK = 1.01
"""Covers the rounding of the bounds themselves, which are computed in float32."""
TINY = 2.0**-120
"""Far above what flushing subnormal numbers to zero can cost one product."""
WORTH = 2**27
"""Multiplications (rows × latents × width) below which the float32 product is too cheap to be worth a detour."""

BLOCK = 2**19
"""float32 numbers looked at together where several passes follow each other."""
WEIGHED = 2**18
"""float64 products held at once while close calls are weighed."""
NEEDED = "_linear_pointwise"
"""The operation of torch's that oneDNN's product goes by."""
NARROW = 64
"""Latents below which matrix kernels may sum in another order for another number of rows (seen below 16)."""
LEAST_ROWS = 16
"""Rows below which matrix kernels may sum in another order for another number of rows (seen below 12)."""

_scoring: ContextVar[Scoring] = ContextVar("unmix_scoring", default="auto")


@contextmanager
def scoring(kind: Scoring) -> Generator[None]:
    """How encoders score inside the block: `auto` (bfloat16 where it is faster), `exact` (float32), or `bfloat16`.

    The selected latents are the same each way; values differ in their last bits.
    """
    token = _scoring.set(kind)
    try:
        yield
    finally:
        _scoring.reset(token)


@dataclass
class Tally:
    """Rows whose candidates came from a bfloat16 product, and how many of them float32 had to score again."""

    rows: int = 0
    again: int = 0


_tally: ContextVar[Tally | None] = ContextVar("unmix_scoring_tally", default=None)


@contextmanager
def tally() -> Generator[Tally]:
    """Counts what happens inside the block, for tests and benchmarks."""
    counted = Tally()
    token = _tally.set(counted)
    try:
        yield counted
    finally:
        _tally.reset(token)


def count(rows: int, again: int) -> None:
    """Add to the tally around, if there is one."""
    counted = _tally.get()
    if counted is not None:
        counted.rows += rows
        counted.again += again


def worthwhile(x: Tensor, W: Tensor) -> bool:
    """Whether candidates should come from a bfloat16 product: asked for, or faster on this machine at this size."""
    kind = _scoring.get()
    if kind == "exact" or not (x.dtype == W.dtype == torch.float32 and x.device.type == "cpu"):
        return False
    if x.shape[0] < LEAST_ROWS or W.shape[0] < NARROW:
        return False
    return kind == "bfloat16" or (x.shape[0] * W.numel() >= WORTH and _multiplies_bfloat16())


def fused() -> bool:
    """Whether the product is oneDNN's, with its bias and weights packed once for all tiles."""
    return _multiplies_bfloat16() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, NEEDED)


def _multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(flag, False) for flag in ("avx512_bf16", "amx_bf16"))


def norms(x: Tensor) -> Tensor:
    """Upper bounds of the rows' Euclidean norms `[rows]`, squares that underflow included."""
    return torch.linalg.vector_norm(x, dim=-1) * SLACK + x.shape[-1] ** 0.5 * 2.0**-62


def lowered(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(x in bfloat16, norms of its rows [rows], norms of what rounding took from them [rows])`.

    Block by block, so that what is made on the way stays in the cache.
    """
    low = torch.empty_like(x, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    norm, wrong = x.new_empty(len(x)), x.new_empty(len(x))
    step = max(1, BLOCK // x.shape[1])
    for part, small, n, w in zip(x.split(step), low.split(step), norm.split(step), wrong.split(step), strict=True):
        small.copy_(part)
        n.copy_(norms(part))
        # float() first: a difference of two dtypes is not vectorised and takes three times as long.
        w.copy_(norms(small.float().sub_(part)))
    return low, norm, wrong


@dataclass(frozen=True)
class Margins:
    """How far off the scores of each token can be, in the gate's space; all `[rows, 1]`."""

    screen: Tensor
    """|float32 gate − bfloat16 gate|, before the relative rounding of the output."""
    round_off: Tensor
    """|float32 gate − true gate|, whatever the order of summation."""


ROUNDED = 2.0**-8 * SLACK
"""Relative rounding of a number to bfloat16."""


class Product:
    """`x̃ Wᵀ + shift` in bfloat16, accumulated in float32.

    oneDNN adds the bias before it rounds; where torch was built without it, the bias is a second pass and rounds again.
    """

    def __init__(self, W_low: Tensor, shift: Tensor) -> None:
        """`W_low` `[F, d]` in bfloat16, `shift` `[F]` in float32."""
        self.shift = shift if bool(shift.count_nonzero()) else None
        self._packed = None
        if fused():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(W_low)
            self.relative = ROUNDED
        else:
            self._W, self._low = W_low, shift.bfloat16()
            self.relative = ROUNDED * (1 if self.shift is None else 2)

    def wrong_bias(self, bias: Tensor) -> Tensor:
        """How far off the bias can be, and what its own rounding costs, where none exceeds `bias`."""
        if self._packed is not None or self.shift is None:
            return 4 * UNIT * bias
        return (self.shift - self._low).abs().max() + 2 * ROUNDED * bias

    def __call__(self, x_low: Tensor) -> Tensor:
        """A new `[rows, F]`."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x_low, self._packed, self.shift, "none", [], "")
        tile = torch.mm(x_low, self._W.T)
        return tile if self.shift is None else tile.add_(self._low)


class Screen:
    """An affine map `gate_j = s_j·(<x, W_j> + b_j)` in bfloat16, with bounds of its error against float32.

    With a `floor` (one number or one a latent) what is scored is how far the gate lies above it.
    """

    def __init__(
        self, x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, floor: Tensor | float | None = None
    ) -> None:
        self.x, self.W, self.b, self.scale = x, W, b, scale
        scaled = W if scale is None else W * scale.unsqueeze(-1)
        shift = b if scale is None else b * scale
        bias = shift.abs().max()
        if floor is not None:
            shift = shift - floor
            bias = bias + shift.abs().max()
        self.x_low, norms_x, wrongs_x = lowered(x)
        W_low, norms_W, wrongs_W = lowered(scaled)
        norm_W, wrong_W = norms_W.max(), wrongs_W.max()
        norm_x, wrong_x = norms_x.unsqueeze(-1), wrongs_x.unsqueeze(-1)
        self.product = Product(W_low, shift)
        self.relative = self.product.relative
        self.usable = bool(torch.isfinite(norm_W + wrong_W + shift.sum()))
        d = x.shape[-1]
        self.tiny = TINY * d * (1 + norm_W + norm_x + (0 if scale is None else scale.abs().max()))
        round_off = SLACK * UNIT * ((d + 8) * norm_x * norm_W + 4 * bias) + self.tiny
        accumulated = 2 * (d + 8) * UNIT * (norm_x + wrong_x) * (norm_W + wrong_W)
        wrong = wrong_x * norm_W + (norm_x + wrong_x) * wrong_W + self.product.wrong_bias(bias) + accumulated
        self.margins = Margins(SLACK * wrong + 2 * round_off, round_off)

    def tiles(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """`(first row, bfloat16 gates [t, F])` of tile after tile, which may be written over."""
        for start in range(0, len(self.x), rows):
            yield start, self.product(self.x_low[start : start + rows])

    def gates(self, z: Tensor, ids: Tensor) -> Tensor:
        """Gates of pre-activations, as the float32 path computes them."""
        return z if self.scale is None else z * self.scale.index_select(0, ids)

    def weigh(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Gates of pairs in float64, and how far off the float32 path's can be.

        A matrix kernel adds products in runs of consecutive coordinates, one run or several: each of the d sums that it
        rounds is a difference of two prefix sums, and none exceeds their range. A test holds the bound on the machine.
        """
        at_once = max(1, WEIGHED // self.x.shape[-1])
        pieces = [self._weigh(*pair) for pair in zip(rows.split(at_once), ids.split(at_once), strict=True)]
        gates, off = zip(*pieces, strict=True)
        return torch.cat(gates), torch.cat(off)

    def _weigh(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a piece that fits the cache."""
        products = self.x.index_select(0, rows).double().mul_(self.W.index_select(0, ids))
        prefix = products.cumsum(-1)
        dot, reach = prefix[:, -1], prefix.amax(-1).clamp_min_(0) - prefix.amin(-1).clamp_max_(0)
        size = products.abs_().sum(-1)
        bias = self.b.index_select(0, ids).double()
        z = dot + bias
        off = SLACK * UNIT * (self.x.shape[-1] * reach + size + 2 * z.abs() + 2 * bias.abs())
        if self.scale is not None:
            factor = self.scale.index_select(0, ids).double()
            z, off = z * factor, (off + SLACK * UNIT * z.abs()) * factor.abs()
        return z, off + self.tiny.squeeze(-1).index_select(0, rows)


def hits(tile: Tensor, floor: Tensor) -> Tensor:
    """Flat places of the entries of `tile [t, F]` that reach their row's `floor [t, 1]`; `tile` is written over.

    The comparison in place keeps its dtype and is vectorised; reading four marks as one integer makes the list of them
    five times as fast as `nonzero` on a mask.
    """
    marks = tile.ge_(floor).view(-1)
    if len(marks) % 4:
        return marks.view(torch.int16).nonzero().squeeze(-1)
    words = marks.view(torch.int64)
    found = words.nonzero().squeeze(-1)
    inside = words.index_select(0, found).view(torch.int16).nonzero().squeeze(-1)
    return found.index_select(0, inside >> 2).mul_(4).add_(inside.bitwise_and_(3))


def below(floor: Tensor) -> Tensor:
    """The largest bfloat16 numbers that are at most `floor`; infinite ones stay, of either sign."""
    nearest = floor.bfloat16()
    bits = nearest.view(torch.int16).to(torch.int32)
    # One unit down is one less in the bits of a positive number, one more in those of a negative one.
    lower = torch.where(nearest > 0, bits - 1, bits + 1).to(torch.int16).view(torch.bfloat16)
    lower = torch.where(nearest == 0, torch.tensor(-TINY, dtype=torch.bfloat16), lower)
    return torch.where((nearest.float() > floor) & torch.isfinite(floor), lower, nearest)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest bfloat16 number of each row `[t, n]` → float32 `[t, 1]`; NaN counts as large or small.

    As integers the bits are ordered as the numbers are, once those of negative ones are turned round; `topk` of
    integers takes two thirds of the time.
    """
    bits = values.view(torch.int16)
    least = _turned(bits).topk(k, sorted=False).values.amin(-1, keepdim=True)
    return _turned(least).view(torch.bfloat16).float()


def _turned(bits: Tensor) -> Tensor:
    """int16: the order of the bits to the order of the numbers, and back."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def two_least(best: Tensor) -> tuple[Tensor, Tensor]:
    """The second smallest and the smallest of each row `[t, n]`, n at least 2, as `[t, 1]` each."""
    place = best.argmin(-1, keepdim=True)
    return best.scatter(-1, place, torch.inf).amin(-1, keepdim=True), best.gather(-1, place)
