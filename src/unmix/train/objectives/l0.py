"""Penalties on how many latents fire, for jumprelu coders: L0, its distance from a target, and Anthropic's tanh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig, JumpReLU
from unmix.coder.sparse import entry_dots
from unmix.core.errors import ConfigError
from unmix.train.objectives import Step
from unmix.train.objectives.decoding import latent_norms, magnitudes
from unmix.train.objectives.specs import L0Spec


class L0:
    """`step`: mean L0 of a token; `quadratic`: (L0 / target − 1)²; both reach θ through the rectangle kernel.

    `tanh`: mean over tokens of Σ tanh(c·f·‖w_dec‖), by ordinary gradients of the codes.
    Sources: 2407.14435 §4 (step, §4.1 of its appendix for the target), Anthropic's update of January 2025 (tanh).
    """

    name = "l0"

    def __init__(self, spec: L0Spec, coder: CoderConfig) -> None:
        """`ConfigError` for a coder without thresholds that learn, where the form needs them."""
        rule = coder.activation
        if spec.form == "tanh":
            if rule.kind not in ("jumprelu", "relu", "gated"):
                raise ConfigError(
                    f"the term l0 of form tanh belongs to jumprelu, relu and gated coders, {coder.name} is {rule.kind}"
                )
        elif not isinstance(rule, JumpReLU):
            raise ConfigError(f"the term l0 belongs to jumprelu coders, {coder.name} is {rule.kind}")
        elif rule.keep_max:
            raise ConfigError(f"the term l0 needs thresholds that learn, and those of {coder.name} (keep_max) do not")
        self.spec, self.bandwidth = spec, rule.bandwidth if isinstance(rule, JumpReLU) else 0.0

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        if self.spec.form == "tanh":
            sizes = magnitudes(step.codes) * latent_norms(step.coder)[step.codes.indices.long()]
            return torch.tanh(self.spec.scale * sizes).sum() / step.codes.rows
        l0 = fired(step, self.bandwidth).sum() / step.codes.rows
        return l0 if self.spec.target is None else (l0 / self.spec.target - 1).square()


def fired(step: Step, bandwidth: float) -> Tensor:
    """1 for each entry [nnz] that is above its θ; the gradient of θ is the kernel's."""
    coder, ids = step.coder, step.codes.indices.long()
    scale, bias = coder.gate_factor(), coder.input_bias()
    with torch.no_grad():
        centred = step.x if bias is None else step.x - bias
        # Codes below θ are 0: their pre-activations are gone and made again, for the selected pairs alone.
        z = entry_dots(centred.contiguous(), coder.W_enc, step.codes.indices, step.codes.offsets) + coder.b_enc[ids]
        gate = z if scale is None else z * scale[ids]
    theta = coder.extra()["threshold"][ids]
    return _Heaviside.apply(gate, theta, bandwidth)  # pyright: ignore[reportReturnType]


class _Heaviside(torch.autograd.Function):
    """1[g > θ]; ∂/∂θ = −(1/ε)·1[|g − θ| < ε/2]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward((gate - theta).abs() < bandwidth / 2)
        ctx.bandwidth = bandwidth
        return (gate > theta).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (near,) = ctx.saved_tensors
        return None, -grads[0] * near / ctx.bandwidth, None
