"""Schedule-free Adam (Defazio et al. 2024, arXiv 2405.15682, algorithm 1): an average instead of a decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from unmix.core.errors import ConfigError
from unmix.train.config import OptimConfig
from unmix.train.optimisers import learning

EPS = 1e-8


class ScheduleFreeAdam(torch.optim.Optimizer):
    """Gradients are taken at y = (1 − β₁)·z + β₁·x; z takes Adam's steps without momentum; x is z's weighted mean.

    While training a parameter holds y; `finish` puts x there, which is what is used. A step of rate γ has the weight
    γ², so that a warm-up counts less (the paper's §4.1).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        """β₁ above 0: x could not be told from y and z otherwise."""
        if not 0 < betas[0] < 1:
            raise ConfigError(f"schedule_free needs betas[0] between 0 and 1, found {betas[0]:g}")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group["lr"], *group["betas"])

    def _move(self, p: nn.Parameter, grad: torch.Tensor, lr: float, first: float, second: float) -> None:
        state: dict[str, Any] = self.state[p]
        if not state:
            state |= {
                "z": p.clone(), "square": torch.zeros_like(p),
                "step": torch.zeros((), dtype=torch.int64), "weight": torch.zeros((), dtype=torch.float64),
            }  # fmt: skip
        z, square = state["z"], state["square"]
        state["step"] += 1
        square.lerp_(grad * grad, 1 - second)
        scale = (square / (1 - second ** int(state["step"]))).sqrt_().add_(EPS)
        x = (p - (1 - first) * z) / first
        z.addcdiv_(grad, scale, value=-lr)
        state["weight"] += lr * lr
        share = lr * lr / float(state["weight"]) if lr > 0 else 0.0
        x.lerp_(z, share)
        p.copy_(x.lerp_(z, 1 - first))

    @torch.no_grad()
    def finish(self) -> None:
        """Put the average x into every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                state: dict[str, Any] = self.state[p]
                if state:
                    p.copy_((p - (1 - group["betas"][0]) * state["z"]) / group["betas"][0])


def make(coder: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """`ConfigError` where decoder rows are held at norm 1: a mean of unit vectors has none."""
    if config.unit_norm is not False:
        raise ConfigError("optimiser schedule_free needs unit_norm: false; it averages weights, and means are shorter")
    return ScheduleFreeAdam(learning(coder), config.lr, config.betas)
