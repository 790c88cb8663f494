"""Signum: the sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434, algorithm 2). Half of Adam's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from unmix.train.config import OptimConfig
from unmix.train.optimisers import learning


class Signum(torch.optim.Optimizer):
    """m ← β·m + (1 − β)·g; p ← p − lr·sign(m)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        """`momentum` is β, 0 to below 1."""
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state: dict[str, Any] = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                mean = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                p.add_(mean.sign(), alpha=-group["lr"])


def make(coder: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Its steps are of one size for every weight: a tenth of Adam's learning rate is a good first try."""
    return Signum(learning(coder), config.lr, config.betas[0])
