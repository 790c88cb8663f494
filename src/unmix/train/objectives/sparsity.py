"""Sparsity penalties: L1 times decoder norm for relu codes, L0 through the straight-through gate for jumprelu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig, JumpReLU
from unmix.coder.sparse import pair_dots
from unmix.core.errors import ConfigError
from unmix.train.objectives import Step
from unmix.train.objectives.specs import L0Spec, L1Spec


class L1:
    """Mean over tokens of Σ f·‖w_dec‖ (Anthropic, April 2024 update)."""

    name = "l1"

    def __init__(self, spec: L1Spec, coder: CoderConfig) -> None:
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        norms = step.coder.W_dec.norm(dim=-1)
        return (step.codes.values.abs() * norms[step.codes.indices.long()]).sum() / step.codes.rows


class L0:
    """Mean number of latents a token, differentiable in θ through the rectangle kernel (2407.14435 §4)."""

    name = "l0"

    def __init__(self, spec: L0Spec, coder: CoderConfig) -> None:
        """`ConfigError` for a coder without thresholds."""
        if not isinstance(coder.activation, JumpReLU):
            raise ConfigError(f"the term l0 belongs to jumprelu coders, {coder.name} is {coder.activation.kind}")
        self.spec, self.bandwidth = spec, coder.activation.bandwidth

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        scale = step.coder.gate_factor()
        bias = step.coder.input_bias()
        centred = step.x if bias is None else step.x - bias
        ids = step.codes.indices.long()
        rows = step.codes.token_rows()
        with torch.no_grad():
            z = pair_dots(centred.contiguous(), rows, step.coder.W_enc, ids) + step.coder.b_enc[ids]
            gate = z if scale is None else z * scale[ids]
        theta = step.coder.extra()["threshold"][ids]
        fired: Tensor = _Heaviside.apply(gate, theta, self.bandwidth)  # pyright: ignore[reportAssignmentType]
        return fired.sum() / step.codes.rows


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
