"""What a norm is beside its scale: gain, bias, and whether it takes the mean off.

Every norm of the supported families is γ ⊙ c(x) / s(x) + β: c takes the mean over the width off (LayerNorm) or nothing
(RMSNorm), and s is the one part that is not linear. Gain, bias and kind are found by calling a copy of the module, so
that families that store 1 + γ or scale otherwise need no table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmix.core.errors import ModelError
from unmix.lm.views import copy_with

_SIZE = 1000.0
"""Of the inputs that are tried: far above every norm's eps."""


@dataclass(frozen=True)
class LinearNorm:
    """A norm with its scale taken out."""

    gain: Tensor
    """[d]; [heads, d] where every head has its own; [1] where it has none."""
    bias: Tensor
    """As the gain."""
    centred: bool
    """Whether the mean over the width is taken off first."""

    def centre(self, x: Float[Tensor, "*leading d"]) -> Float[Tensor, "*leading d"]:
        """c(x)."""
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    def apply(self, v: Float[Tensor, "*leading d"], scale: Tensor | float) -> Float[Tensor, "*leading d"]:
        """What a part v of the input adds to the output at `scale`: γ ⊙ c(v) / s."""
        return self.gain * self.centre(v) / scale

    def scale(self, module: nn.Module, x: Float[Tensor, "*leading d"]) -> Float[Tensor, "*leading"]:
        """s at inputs x, from what the module itself gives for them."""
        folded = (self.gain * self.centre(x.float())).norm(dim=-1)
        weight = next(module.parameters(), None)
        out: Tensor = module(x if weight is None else x.to(weight.dtype))
        given = (out.float() - self.bias).norm(dim=-1)
        return folded / given.clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def linear_norm(module: nn.Module, width: int) -> LinearNorm:
    """Gain, bias and kind of a LayerNorm or RMSNorm of any family, float32; `width` where it has no weight that says.

    `ModelError` for a module that is neither.
    """
    weights = dict(module.named_parameters(recurse=False))
    where = next(module.parameters(), torch.zeros(0))
    shape = next((tuple(w.shape) for w in weights.values() if w.ndim), (width,))
    # In float32 whatever the model is in, and without the hooks that the model's own has.
    bare = copy_with(module, {name: weight.detach().float() for name, weight in weights.items()})

    def tried(x: Tensor) -> Tensor:
        out: Tensor = bare(x.to(where.device).expand(1, 1, *shape))
        return out.float().view(shape)

    random = torch.Generator().manual_seed(0)
    u = (torch.rand(shape[-1], generator=random) + 0.5) * (torch.arange(shape[-1]) % 2 * 2.0 - 1.0) * _SIZE
    up, down, shifted = tried(u), tried(-u), tried(u + _SIZE)
    centred = bool((up - shifted).norm() <= 0.01 * up.norm())
    gain, bias = (up - down) / 2 / _unit(u, centred).to(up), (up + down) / 2
    probe = _SIZE * torch.linspace(-1.0, 2.0, shape[-1])
    if not torch.allclose(tried(probe), gain * _unit(probe, centred).to(up) + bias, atol=2e-2, rtol=2e-2):
        raise ModelError(f"{type(module).__name__} is neither a LayerNorm nor an RMSNorm, so its gain cannot be folded")
    if not weights:
        # One number for any width: a norm of values, say, is as wide as a head.
        gain, bias = gain[:1], bias[:1]
    return LinearNorm(gain, bias, centred)


def _unit(x: Float[Tensor, " d"], centred: bool) -> Float[Tensor, " d"]:
    x = x - x.mean() if centred else x
    return x / x.square().mean().sqrt()
