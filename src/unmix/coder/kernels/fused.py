"""A top-k coder's step by kernels: an autograd function, and a whole training step that never writes its gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.kernels.adam import Adam, Dictionary, Row, plain_step
from unmix.coder.kernels.decode import decode, residual
from unmix.coder.kernels.encode import top_codes
from unmix.coder.kernels.gradients import Ending, latent_gradients, take_step
from unmix.coder.kernels.plain import product
from unmix.coder.kernels.rules import TopRule
from unmix.core.errors import NonFiniteError

Relu = Literal["before", "after", "none"]


class _FusedTopK(torch.autograd.Function):
    """Encode and decode; backwards one pass over the latents serves all four parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor | None, W_dec: Tensor, b_dec: Tensor,
        scale: Tensor | None, k: int, relu: Relu, magnitude: bool, low: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        centred = (x if b_pre is None else x - b_pre).to(low)
        found = top_codes(centred, W_enc.to(low), b_enc, scale, TopRule(k, magnitude, relu == "before"))
        values = found.z if relu == "none" else found.z.relu()
        y = decode(values, W_dec, found.indices, found.offsets, b_dec)
        ctx.save_for_backward(centred, W_enc, W_dec, values, found.indices, found.offsets)
        ctx.relu, ctx.has_pre = relu != "none", b_pre is not None
        ctx.mark_non_differentiable(found.indices, found.offsets)
        return y, values, found.indices, found.offsets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc, W_dec, values, indices, offsets = ctx.saved_tensors
        found = latent_gradients(
            indices, offsets, values, grads[0], W_dec, centred, grads[1].contiguous(), len(W_enc), ctx.relu
        )
        need_x, _, _, need_pre = ctx.needs_input_grad[:4]
        grad_x = decode(found.z, W_enc, indices, offsets) if need_x else None
        # Σ over tokens of −W_encᵀ dz: one product with the summed gradient, not one a token.
        grad_pre = -(found.bias @ W_enc) if need_pre and ctx.has_pre else None
        return grad_x, found.enc, found.bias, grad_pre, found.dec, grads[0].sum(0), *(None,) * 5


def fused_topk(
    x: Float[Tensor, "t d_in"],
    W_enc: Float[Tensor, "F d_in"],
    b_enc: Float[Tensor, " F"],
    b_pre: Float[Tensor, " d_in"] | None,
    W_dec: Float[Tensor, "F d_out"],
    b_dec: Float[Tensor, " d_out"],
    k: int,
    relu: Relu = "after",
    magnitude: bool = False,
    scale: Float[Tensor, " F"] | None = None,
    low: torch.dtype = torch.bfloat16,
) -> tuple[Float[Tensor, "t d_out"], Float[Tensor, " nnz"], Int[Tensor, " nnz"], Int[Tensor, " t_plus_1"]]:
    """`(reconstruction, values, latent ids, offsets)` of float32 parameters, scored in `low`.

    Gradients flow from reconstruction and values to `x`, both weights and all biases; not to `scale`, which only moves
    the selection. Encoder gradients are of the input as it was scored, rounded to `low`.
    """
    if not bool(torch.isfinite(x.detach().sum())):
        refuse_nonfinite(x, "the input")
    y, values, indices, offsets = _FusedTopK.apply(  # pyright: ignore[reportGeneralTypeIssues]
        x, W_enc, b_enc, b_pre, W_dec, b_dec, scale, k, relu, magnitude, low
    )
    return y, values, indices, offsets


def refuse_nonfinite(rows: Tensor, what: str) -> None:
    """Raise `NonFiniteError` where rows hold NaN or infinity, naming the first of them."""
    bad = (~torch.isfinite(rows.detach()).all(-1)).nonzero().squeeze(-1)
    if len(bad):
        some = ", ".join(map(str, bad[:8].tolist()))
        raise NonFiniteError(
            f"{what} holds NaN or infinity in {len(bad)} of {len(rows)} rows ({some}); no weight moved"
        )


@dataclass(frozen=True)
class StepResult:
    """What a training step tells. Tensors on the device: reading them waits for it."""

    loss: Float[Tensor, ""]
    """Σ‖y − target‖² / (tokens · variance)."""
    values: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    offsets: Int[Tensor, " t_plus_1"]
    again: int
    """Tokens that the plain path had to encode."""


def fused_topk_step(
    params: Dictionary,
    b_dec: Row,
    x: Float[Tensor, "t d"],
    k: int,
    adam: Adam,
    variance: float,
    clip: float | None = None,
    unit: bool = True,
    tied: bool = True,
) -> StepResult:
    """One whole step of a top-k autoencoder: squared error over `variance`, unit decoder rows, Adam.

    `tied`: `b_dec` is subtracted from the input too. Scores and gradients are taken with the parameters' low-precision
    copies, where they keep them. Without `clip` gradients of the weights never reach memory: projection, Adam,
    normalisation and copy end the backward pass (a tied bias needs `spare` copies for that: its gradient wants the
    encoder as it was). With `clip` they are written, and the step is a second pass, since the norm is known only at the
    end of the first. `NonFiniteError` where input or loss (with `clip` the norm too) are not finite; nothing has moved.
    """
    W_enc = params.enc.weight if params.enc.low is None else params.enc.low
    W_dec = params.dec.weight if params.dec.low is None else params.dec.low
    centred = (x - b_dec.weight if tied else x).to(W_enc.dtype)
    found = top_codes(centred, W_enc, params.bias.weight, None, TopRule(k))
    values = found.z.relu()
    error, squares = residual(values, W_dec, found.indices, found.offsets, b_dec.weight, x, W_enc.dtype)
    loss, scale = squares.sum() / (len(x) * variance), 2.0 / (len(x) * variance)
    go = torch.isfinite(loss) & torch.isfinite(centred.sum(dtype=torch.float32))
    at_once = clip is None and (not tied or params.enc.spare is not None)
    last = Ending(params=params, adam=adam, unit=unit, go=go)
    ending = replace(last, project=unit) if at_once else Ending(project=unit, squares=clip is not None, params=params)
    grads = latent_gradients(
        found.indices, found.offsets, values, error, W_dec, centred, None, len(W_enc), True, scale, ending
    )
    grad_b = error.float().sum(0) * scale
    if tied:
        grad_b = grad_b - _weighted_sum(grads.bias, W_enc)
    factor = torch.ones_like(loss)
    if clip is not None and grads.squares is not None:
        norm = (grads.squares.sum() + grad_b.square().sum()).sqrt()
        factor, go = (clip / (norm + 1e-6)).clamp_max(1.0), go & torch.isfinite(norm)
    if not bool(go):
        refuse_nonfinite(x, "the input")
        raise NonFiniteError(f"the loss is {float(loss)}, or its gradient is not finite; no weight moved")
    if not at_once:
        take_step(grads, replace(last, clip=factor, go=None))
    params.swap()
    plain_step(b_dec, grad_b, adam, factor)
    return StepResult(loss, values, found.indices, found.offsets, found.again)


def _weighted_sum(weights: Float[Tensor, " F"], rows: Float[Tensor, "F d"]) -> Float[Tensor, " d"]:
    """`weights @ rows` in float32; low-precision rows are read as they are, the weights in two parts."""
    if rows.dtype == torch.float32:
        return weights @ rows
    high = weights.to(rows.dtype)
    both = torch.stack([high, (weights - high.float()).to(rows.dtype)])
    return product(both, rows.T).sum(0)
