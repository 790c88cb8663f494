"""Norms as linear maps: what they multiply by at a token is taken from the forward pass and held.

RMSNorm: y = r·γ⊙x + β with r = 1/rms(x). LayerNorm: y = r·γ⊙(x − mean x) + β with r = 1/std(x). Holding r makes both
linear, so that the effect of a latent on what comes after is a plain product (Ameisen et al. 2025, "Circuit Tracing").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmix.lm.norms import LinearNorm, linear_norm
from unmix.lm.sites import Site

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel
    from unmix.lm.sites import Pass


def find_norms(lm: LanguageModel) -> dict[str, LinearNorm]:
    """Every norm of the model by module path: those on the stream, after sublayers, and on queries and keys."""
    found: dict[str, LinearNorm] = {}
    for path, module in lm.model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith("Norm"):
            found[path] = linear_norm(module, _width(module, lm.d_model))
    return found


def freeze_norms(current: Pass, norms: dict[str, LinearNorm]) -> None:
    """Let the norms of this pass be linear for gradients; their values stay what they are."""
    for path, parts in norms.items():
        held: list[Tensor] = []
        current.read(Site(path, "in"), held.append)

        def handler(y: Tensor, held: list[Tensor] = held, parts: LinearNorm = parts) -> Tensor:
            return frozen(held.pop(), y.detach(), parts)

        current.write(Site(path, "out"), handler)


def frozen(x: Float[Tensor, "*leading d"], y: Float[Tensor, "*leading d"], parts: LinearNorm) -> Tensor:
    """The values `y` of the norm at `x`, with the gradient of the linear map that multiplies by today's r."""
    return _Frozen.apply(x, y, parts)  # pyright: ignore[reportReturnType]


class _Frozen(torch.autograd.Function):
    """∂y/∂x = r·γ⊙(I − 1/d where centred)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, parts: LinearNorm) -> Tensor:
        x32 = x.float()
        plain = parts.centre(x32) * parts.gain
        # y − β is r·plain: least squares gives r back whatever the module's eps is, and 0 for a token of zeros.
        size = plain.square().sum(-1, keepdim=True)
        r = ((y.float() - parts.bias) * plain).sum(-1, keepdim=True) / size.clamp_min(1e-30)
        ctx.save_for_backward(r)
        ctx.parts = parts
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (r,) = ctx.saved_tensors
        grad = ctx.parts.centre(grads[0].float() * ctx.parts.gain * r)
        return grad.to(grads[0].dtype), None, None


def _width(module: nn.Module, otherwise: int) -> int:
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else otherwise
