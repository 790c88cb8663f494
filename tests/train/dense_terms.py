"""Every term of the loss as its formula says it, dense and by plain autograd: slow, obvious, and sharing no code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmix.coder import reference
from unmix.coder.activations import make_activation
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.objectives.specs import AuxKSpec, GateSpec, L0Spec, L1Spec, MseSpec, MultiTopKSpec


@dataclass(frozen=True)
class Dense:
    """One batch in the coder's inner space, with everything `[rows, latents]`."""

    coder: SparseCoder
    s: Tensor
    target: Tensor
    z: Tensor
    """Pre-activations."""
    f: Tensor
    """Codes."""
    variance: float
    dead: list[int]
    progress: float

    @classmethod
    def of(cls, coder: SparseCoder, x: Tensor, target: Tensor | None, **rest: Any) -> Dense:
        """`target` None: what is read is written."""
        s, _ = coder.prepare(x)
        bias = coder.input_bias()
        z = (s if bias is None else s - bias) @ coder.W_enc.T + coder.b_enc
        jump = coder.config.activation.kind == "jumprelu" and not coder.config.activation.keep_max  # pyright: ignore[reportAttributeAccessIssue]
        f = jumped(coder, z) if jump else reference.encode_dense(coder, x)
        return cls(coder, s, s if target is None else target, z, f, **rest)

    @property
    def gate(self) -> Tensor:
        """Where selections and thresholds act; no gradient flows to its factor."""
        factor = self.coder.gate_factor()
        return self.z if factor is None else self.z * factor

    @property
    def base(self) -> Tensor:
        """The output where nothing fires."""
        skip = self.s @ self.coder.W_skip.T if self.coder.config.skip else 0.0
        return self.coder.b_dec + skip

    @property
    def norms(self) -> Tensor:
        """Of decoder rows; added up over the hooks of a crosscoder."""
        config = self.coder.config
        parts = list(config.parts()) if len(config.reads) > 1 and config.reads == config.writes else [config.width_out]
        return torch.stack([part.norm(dim=-1) for part in self.coder.W_dec.split(parts, dim=-1)]).sum(0)

    def error(self, y: Tensor) -> Tensor:
        """Mean over rows of the squared distance, in units of the variance."""
        return (self.target - y).pow(2).sum(-1).mean() / self.variance


def straight_through(hard: Tensor, slope: Tensor, theta: Tensor) -> Tensor:
    """The value `hard`, whose derivative by θ is `slope`."""
    return hard + slope.detach() * (theta - theta.detach())


def near(coder: SparseCoder, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(fired, inside the kernel, gate's factor)`, all [rows, latents] or broadcast to it."""
    theta, width = coder.extra()["threshold"], coder.config.activation.bandwidth  # pyright: ignore[reportAttributeAccessIssue]
    factor = coder.gate_factor()
    factor = torch.ones_like(theta) if factor is None else factor
    gate = (z * factor).detach()
    return (gate > theta) & (z > 0), ((gate - theta).abs() < width / 2) & (z > 0), factor


def jumped(coder: SparseCoder, z: Tensor) -> Tensor:
    """z·1[g > θ]; ∂/∂θ = −(θ / factor) / ε inside the kernel (2407.14435, eq. 11)."""
    fired, inside, factor = near(coder, z)
    theta, width = coder.extra()["threshold"], coder.config.activation.bandwidth  # pyright: ignore[reportAttributeAccessIssue]
    slope = torch.where(inside, -(theta / factor) / width, 0.0)
    return straight_through(torch.where(fired, z, 0.0), slope, theta)


def mse(spec: MseSpec, step: Dense) -> Tensor:
    """Σ or mean over prefixes p and F of the error of the first p latents."""
    sizes = [*spec.prefixes, step.coder.n_latents]
    errors = [step.error(step.f[:, :p] @ step.coder.W_dec[:p] + step.base) for p in sizes]
    return torch.stack(errors).sum() / (len(sizes) if spec.reduce == "mean" else 1)


def l1(spec: L1Spec, step: Dense) -> Tensor:
    """Mean over rows of Σ (|f|·‖w‖)^p, p on the line from `p` to `p_end`."""
    p = spec.p if spec.p_end is None else spec.p * (1 - step.progress) + spec.p_end * step.progress
    size = torch.where(step.f < 0, -1, 1) * step.f * (step.norms if spec.norms else 1.0)
    return (size.sum() if p == 1.0 else size[size > 0].pow(p).sum()) / len(step.f)


def l0(spec: L0Spec, step: Dense) -> Tensor:
    """L0, its squared relative distance from a target, or the mean Σ tanh(c·f·‖w‖)."""
    if spec.form == "tanh":
        return torch.tanh(spec.scale * step.f * step.norms).sum(-1).mean()
    fired, inside, _ = near(step.coder, step.z)
    slope = torch.where(inside, -1.0 / step.coder.config.activation.bandwidth, 0.0)  # pyright: ignore[reportAttributeAccessIssue]
    found = straight_through(fired.double(), slope, step.coder.extra()["threshold"]).sum(-1).mean()
    return found if spec.target is None else (found / spec.target - 1) ** 2


def auxk(spec: AuxKSpec, step: Dense) -> Tensor:
    """Σ‖e − ê‖² / Σ‖e − ē‖², ê from the best dead latents (Gao et al. 2024, A.2); the encoder's bias is held."""
    coder, dead = step.coder, step.dead
    e = (step.target - step.f @ coder.W_dec - step.base).detach()
    spread = (e - e.mean(0)).pow(2).sum()
    if not dead or not bool(spread > 0):
        return step.f.new_zeros(()) * step.f.sum()
    bias = coder.input_bias()
    z = (step.s if bias is None else step.s - bias.detach()) @ coder.W_enc[dead].T + coder.b_enc[dead]
    k = min(spec.k or max(1, coder.config.d_in // 2), len(dead))
    factor = coder.gate_factor()
    gate = (z if factor is None else z * factor[dead]).detach()
    best = gate.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    f = torch.where(torch.zeros_like(z, dtype=torch.bool).scatter(-1, best, True), z.relu(), 0.0)
    return (e - f @ coder.W_dec[dead]).pow(2).sum() / spread


def multi_topk(spec: MultiTopKSpec, step: Dense) -> Tensor:
    """The error with more latents."""
    coder, rule = step.coder, step.coder.config.activation
    wider = make_activation(rule.model_copy(update={"k": min(spec.factor * rule.k, coder.n_latents)}))  # pyright: ignore[reportAttributeAccessIssue]
    f = wider.dense(step.z, coder.gate_factor(), coder.extra(), True)
    return step.error(f @ coder.W_dec + step.base)


def gate(spec: GateSpec, step: Dense) -> Tensor:
    """The error of relu(π) through a frozen decoder, and λ·mean Σ relu(π)·‖w‖ (2404.16014 §3.2)."""
    opened = step.z.relu()
    value = step.error(opened @ step.coder.W_dec.detach() + step.base.detach())
    ramp = min(1.0, step.progress / spec.sparsity_warmup) if spec.sparsity_warmup else 1.0
    return value + spec.sparsity * ramp * (opened * step.norms).sum(-1).mean()


FORMULAS: dict[str, Callable[[Any, Dense], Tensor]] = {
    "mse": mse, "l1": l1, "l0": l0, "auxk": auxk, "multi_topk": multi_topk, "gate": gate,
}  # fmt: skip
"""By the name of the term."""
