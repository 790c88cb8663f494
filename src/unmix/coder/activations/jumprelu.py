"""JumpReLU codes with straight-through gradients of the thresholds (Rajamanoharan et al. 2024, 2407.14435 §3–4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmix.coder.activations.selection import Selector, ThresholdOrMaxSelector, ThresholdSelector
from unmix.coder.config import JumpReLU


class JumpReLUActivation:
    """z where z > θ and z > 0.

    The rectangle kernel gives θ a gradient from entries within ε/2 of it on both sides, so while gradients are
    on the selection reaches down to θ − ε/2; entries below θ stay in the codes as explicit zeros.
    With `keep_max` (OpenSAE) θ has no gradient: what is selected is what fires.
    """

    def __init__(self, config: JumpReLU) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """`threshold` [F]."""
        return {"threshold": torch.full((n_latents,), self.config.initial_threshold)}

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """Above θ (and zero); with gradients on, above θ − ε/2."""
        theta = extra["threshold"].detach()
        if self.config.keep_max:
            return ThresholdOrMaxSelector(theta.clamp_min(0.0))
        reach = self.config.bandwidth / 2 if torch.is_grad_enabled() and extra["threshold"].requires_grad else 0.0
        return ThresholdSelector((theta - reach).clamp_min(0.0))

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """z·1[gate > θ] with the straight-through gradient."""
        if self.config.keep_max:
            return z.relu()
        ids = indices.long()
        factor = None if scale is None else scale[ids]
        return _jump(z, extra["threshold"][ids], factor, self.config.bandwidth)

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """The same on dense pre-activations."""
        if self.config.keep_max:
            return _or_max(z, z if scale is None else z * scale, extra["threshold"])
        factor = None if scale is None else scale.expand_as(z)
        return _jump(z, extra["threshold"].expand_as(z), factor, self.config.bandwidth)


class _Jump(torch.autograd.Function):
    """value z·1[g > θ], g = scale·z; ∂/∂z = 1[g > θ]; ∂/∂θ = −(θ/scale)/ε · 1[|g − θ| < ε/2]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, scale: Tensor | None, bandwidth: float) -> Tensor:
        gate = z if scale is None else z * scale
        fired = (gate > theta) & (z > 0)
        near = ((gate - theta).abs() < bandwidth / 2) & (z > 0)
        height = theta if scale is None else theta / scale
        ctx.save_for_backward(fired, near, height)
        ctx.bandwidth = bandwidth
        return torch.where(fired, z, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fired, near, height = ctx.saved_tensors
        grad = grads[0]
        return grad * fired, torch.where(near, -grad * height / ctx.bandwidth, 0.0), None, None


def _jump(z: Tensor, theta: Tensor, scale: Tensor | None, bandwidth: float) -> Tensor:
    return _Jump.apply(z, theta, scale, bandwidth)  # pyright: ignore[reportReturnType]


def _or_max(z: Tensor, gate: Tensor, theta: Tensor) -> Tensor:
    """z where the gate is above θ, or is the best of a row with nothing above; cut at 0."""
    fired = (gate > theta) & (z > 0)
    best = torch.zeros_like(fired).scatter(-1, gate.argmax(-1, keepdim=True), True)
    return torch.where(fired | (best & ~fired.any(-1, keepdim=True)), z, 0.0).relu()
