"""What a model predicts with and without coders in place, as losses that never hold all of its logits.

Logits are formed for some tokens at a time, together with the gradient of the loss at what the head reads: with
p = softmax of the original's logits and q of the spliced model's, ∂KL(p ‖ q)/∂logits is q − p and ∂CE/∂logits is
q − 1[target]. So a batch costs the head twice forward and once backward, and the memory of one chunk. KL alone, of a
head that ends in a product, goes by tiles of the vocabulary (`unmix.train.objectives.tiles`): that is faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.train.objectives.tiles import LinearHead, TiledKL

CHUNK_BYTES = 24 * 2**20
"""Size of one chunk of float32 logits; about five live at once, two by tiles, whose chunks are twice as large."""
NO_TARGET = -100
"""In place of the next token's id where there is none."""

Head = Callable[[Tensor], Tensor]
"""From rows [n, d] to logits [n, vocab]; of whole logits, the identity."""
Name = Literal["kl", "ce"]


class Predictions:
    """The next token at every position that counts."""

    def __init__(
        self,
        spliced: Float[Tensor, "n d"],
        original: Float[Tensor, "n d"] | None,
        targets: Int[Tensor, " n"],
        head: Head,
        wanted: tuple[Name, ...],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """`original`: what the model as it is gives, needed for kl. `wanted`: the losses that will be asked for."""
        self.spliced, self.original, self.targets = spliced, original, targets
        self.head, self.wanted, self.chunk_bytes = head, wanted, chunk_bytes

    def loss(self, name: Name) -> Tensor:
        """kl: mean of KL(original ‖ spliced) over positions; ce: of −log q(next token) where there is one. In nats."""
        return self._losses[name]

    @cached_property
    def _losses(self) -> dict[Name, Tensor]:
        values: tuple[Tensor, ...] = _HeadLosses.apply(  # pyright: ignore[reportAssignmentType]
            self.spliced, self.original, self.targets, self.head, self.wanted, self.chunk_bytes
        )
        return dict(zip(self.wanted, values, strict=True))


class _HeadLosses(torch.autograd.Function):
    """One scalar for each of `wanted`; gradients at `spliced` are made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        spliced: Tensor,
        original: Tensor | None,
        targets: Tensor,
        head: Head,
        wanted: tuple[Name, ...],
        chunk_bytes: int,
    ) -> tuple[Tensor, ...]:
        if wanted == ("kl",) and original is not None and isinstance(head, LinearHead):
            found = _tiled(spliced, original, head, chunk_bytes, ctx.needs_input_grad[0])
            if found is not None:
                value, slope = found
                ctx.save_for_backward(*([] if slope is None else [slope]))
                ctx.counts = [max(1, len(spliced))]
                return (value,)
        counts = {"kl": max(1, len(spliced)), "ce": max(1, int((targets != NO_TARGET).sum()))}
        sums = {name: torch.zeros((), dtype=torch.float64, device=spliced.device) for name in wanted}
        grads = {name: torch.empty_like(spliced) for name in wanted} if ctx.needs_input_grad[0] else {}
        buffers = _Buffers()
        start, step = 0, 1
        while start < len(spliced):
            rows = slice(start, start + step)
            with torch.enable_grad():
                leaf = spliced[rows].detach().requires_grad_(bool(grads))
                logits = head(leaf)
            parts = _parts(logits.detach(), original, rows, targets[rows], head, wanted, buffers)
            for i, name in enumerate(wanted):
                value, slope = parts[name]
                sums[name] += value
                if grads:
                    more = i + 1 < len(wanted)
                    grads[name][rows] = torch.autograd.grad(logits, leaf, slope.to(logits.dtype), retain_graph=more)[0]
            # The first row alone says how wide the vocabulary is.
            start, step = start + step, max(1, chunk_bytes // (4 * logits.shape[-1]))
        ctx.save_for_backward(*grads.values())
        ctx.counts = [counts[name] for name in wanted]
        wide = torch.float64 if spliced.dtype == torch.float64 else torch.float32
        return tuple((sums[name] / counts[name]).to(wide) for name in wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        parts = [saved * (grad / n).to(saved.dtype) for saved, grad, n in zip(kept, grads, ctx.counts, strict=True)]
        return functools.reduce(torch.add, parts), None, None, None, None, None


def _tiled(
    spliced: Tensor, original: Tensor, head: LinearHead, chunk_bytes: int, slope: bool
) -> tuple[Tensor, Tensor | None] | None:
    """`(mean KL, its sum's gradient at the spliced rows)`; None where it is not finite: whole rows say why."""
    wide = torch.float64 if spliced.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        leaf = spliced.detach().requires_grad_(slope)
        q = head.before(leaf)
    with torch.no_grad():
        p = head.before(original)
    by_tiles = TiledKL(head, wide)
    step = max(1, 2 * chunk_bytes // (4 * len(head.weight)))
    rows = [by_tiles(a, b, slope) for a, b in zip(q.detach().split(step), p.split(step), strict=True)]
    values = torch.cat([value for value, _ in rows]) if rows else spliced.new_zeros(0, dtype=wide)
    if not bool(torch.isfinite(values).all()):
        return None
    value = (values.double().sum() / max(1, len(spliced))).to(wide)
    if not slope:
        return value, None
    grads = [grad for _, grad in rows if grad is not None]
    return value, torch.autograd.grad(q, leaf, torch.cat(grads).to(q.dtype))[0] if grads else torch.zeros_like(spliced)


@torch.no_grad()
def _parts(
    logits: Tensor,
    original: Tensor | None,
    rows: slice,
    targets: Tensor,
    head: Head,
    wanted: tuple[Name, ...],
    buffers: _Buffers,
) -> dict[str, tuple[Tensor, Tensor]]:
    """By loss: its sum over a chunk, float64, and its gradient at the logits."""
    log_q = buffers.log_softmax("q", logits)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if "ce" in wanted:
        has = targets != NO_TARGET
        index = targets.clamp_min(0).unsqueeze(-1)
        value = -log_q.gather(-1, index).squeeze(-1).double().mul(has).sum()
        slope = log_q.exp() if "kl" in wanted else log_q.exp_()
        slope.scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=slope.dtype)).mul_(has.unsqueeze(-1))
        found["ce"] = value, slope
    if "kl" in wanted and original is not None:
        log_p = buffers.log_softmax("p", head(original[rows]))
        p = torch.exp(log_p, out=buffers.like("share", log_p))
        gap = log_p.sub_(log_q)
        value = torch.linalg.vecdot(p, gap)
        if not bool(torch.isfinite(value).all()):
            # A token without mass in p adds nothing, even where q gives it none (−inf − −inf).
            value = torch.linalg.vecdot(p, gap.masked_fill_(p == 0, 0.0))
        found["kl"] = value.double().sum(), log_q.exp_().sub_(p)
    return found


class _Buffers:
    """Chunks that are written again and again: fresh pages for each would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def like(self, name: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Room in the shape of `x`."""
        held = self._held.get(name)
        if held is None or len(held) < len(x):
            held = self._held[name] = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
        return held[: len(x)]

    def log_softmax(self, name: str, logits: Tensor) -> Tensor:
        """In float32, or in float64 where the logits are."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.log_softmax(logits, -1, dtype, out=self.like(name, logits, dtype))


def shared(value: Tensor, n: int) -> Tensor:
    """`value` with a gradient of 1/n: n coders that are spliced together add one loss up to once its weight."""
    return value if n == 1 else value / n + (value * (1 - 1 / n)).detach()
