"""Scores in bfloat16, for selections certified to be those of the float32 path.

Where the processor multiplies bfloat16 in hardware, the product of all tokens with all latents takes half the time. It
only finds *candidates*. What float32 rounds differently is bounded, not hoped for:

    |z − z̃| ≤ ‖x − x̃‖·‖W_j‖ + ‖x̃‖·‖W_j − W̃_j‖ + accumulation + rounding of the output     (`Margins.screen`)

so entries whose bfloat16 score falls short of the k-th largest by more than both are off are in no row's top k. The
candidates (1.5 to 2 k of them) are scored again in float32, and the k best are taken where they stand out from the
others by more than float32 itself can be off, for any order of summation (`Margins.round_off`). Close calls are weighed
once more in float64 (`Screen.weigh`); rows that stay undecided, ties among them, go through the float32 path whole.
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

WEIGHED = 2**18
"""float64 products held at once while close calls are weighed."""
NARROW = 64
"""Latents below which matrix kernels may sum in another order for another number of rows (seen below 16)."""

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
    if kind == "exact" or not (x.dtype == W.dtype == torch.float32 and x.device.type == "cpu" and x.shape[0]):
        return False
    if W.shape[0] < NARROW:
        return False
    return kind == "bfloat16" or (x.shape[0] * W.numel() >= WORTH and _multiplies_bfloat16())


def _multiplies_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(flag, False) for flag in ("avx512_bf16", "amx_bf16"))


def norms(x: Tensor) -> Tensor:
    """Upper bounds of the rows' Euclidean norms `[rows]`, squares that underflow included."""
    return torch.linalg.vector_norm(x, dim=-1) * SLACK + x.shape[-1] ** 0.5 * 2.0**-62


@dataclass(frozen=True)
class Margins:
    """How far off the scores of each token can be, in the gate's space; all `[rows, 1]`."""

    screen: Tensor
    """|float32 gate − bfloat16 gate|, before the relative rounding of the output."""
    round_off: Tensor
    """|float32 gate − true gate|, whatever the order of summation."""


ROUNDED = 2.0**-8 * SLACK
"""Relative rounding of a bfloat16 score: once after the product, and once more after the bias."""


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
        self.W_low, self.x_low, self.b_low = scaled.bfloat16(), x.bfloat16(), shift.bfloat16()
        # float() first: a difference of two dtypes is not vectorised and takes three times as long.
        norm_W, wrong_W = norms(scaled).max(), norms(self.W_low.float().sub_(scaled)).max()
        norm_x, wrong_x = norms(x).unsqueeze(-1), norms(self.x_low.float().sub_(x)).unsqueeze(-1)
        self.usable = bool(torch.isfinite(norm_W + wrong_W + self.b_low.sum()))
        self.biased = bool(self.b_low.count_nonzero())
        self.relative = ROUNDED * (2 if self.biased else 1)
        d = x.shape[-1]
        self.tiny = TINY * d * (1 + norm_W + norm_x + (0 if scale is None else scale.abs().max()))
        round_off = SLACK * UNIT * ((d + 8) * norm_x * norm_W + 4 * bias) + self.tiny
        wrong_bias = (shift - self.b_low).abs().max() + 2 * ROUNDED * bias
        accumulated = 2 * (d + 8) * UNIT * (norm_x + wrong_x) * (norm_W + wrong_W)
        screen = SLACK * (wrong_x * norm_W + (norm_x + wrong_x) * wrong_W + wrong_bias + accumulated) + 2 * round_off
        self.margins = Margins(screen, round_off)

    def tiles(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """`(first row, bfloat16 gates [t, F])` of tile after tile, in one buffer."""
        buffer = self.x_low.new_empty(min(rows, len(self.x)), self.W.shape[0])
        for start in range(0, len(self.x), rows):
            part = self.x_low[start : start + rows]
            tile = torch.mm(part, self.W_low.T, out=buffer[: len(part)])
            yield start, tile.add_(self.b_low) if self.biased else tile

    def gates(self, z: Tensor, ids: Tensor) -> Tensor:
        """Gates of pre-activations, as the float32 path computes them."""
        return z if self.scale is None else z * self.scale[ids]

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
        products = self.x[rows].double().mul_(self.W[ids].double())
        prefix = products.cumsum(-1)
        dot, reach = prefix[:, -1], prefix.amax(-1).clamp_min_(0) - prefix.amin(-1).clamp_max_(0)
        size = products.abs_().sum(-1)
        bias = self.b[ids].double()
        z = dot + bias
        off = SLACK * UNIT * (self.x.shape[-1] * reach + size + 2 * z.abs() + 2 * bias.abs())
        if self.scale is not None:
            factor = self.scale[ids].double()
            z, off = z * factor, (off + SLACK * UNIT * z.abs()) * factor.abs()
        return z, off + self.tiny[rows].squeeze(-1)


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
    inside = words[found].view(torch.int16).nonzero().squeeze(-1)
    return found[inside >> 2] * 4 + (inside & 3)


def below(floor: Tensor) -> Tensor:
    """The largest bfloat16 numbers that are at most `floor`; infinite ones stay, of either sign."""
    nearest = floor.bfloat16()
    bits = nearest.view(torch.int16).to(torch.int32)
    # One unit down is one less in the bits of a positive number, one more in those of a negative one.
    lower = torch.where(nearest > 0, bits - 1, bits + 1).to(torch.int16).view(torch.bfloat16)
    lower = torch.where(nearest == 0, torch.tensor(-TINY, dtype=torch.bfloat16), lower)
    return torch.where((nearest.float() > floor) & torch.isfinite(floor), lower, nearest)
