"""Muon for matrices (Jordan et al. 2024), torch's own; Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unmix.core.errors import MachineError
from unmix.train.config import OptimConfig
from unmix.train.optimisers import learning


class MuonAndAdam(torch.optim.Optimizer):
    """Two optimisers with one state: momentum made orthogonal for matrices, Adam for vectors."""

    def __init__(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        """`betas[0]` is also Muon's momentum. Its steps are scaled to the size of Adam's (`match_rms_adamw`)."""
        super().__init__(params, {"lr": lr})
        matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon: Any = getattr(torch.optim, "Muon", None)
            if muon is None:
                raise MachineError(f"optimiser muon needs torch 2.9 or newer, found {torch.__version__}")
            self._parts.append(
                muon(matrices, lr=lr, momentum=betas[0], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            self._parts.append(torch.optim.Adam(rest, lr=lr, betas=betas))
        for part in self._parts:
            part.state = self.state
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both."""
        for part in self._parts:
            part.step()


def make(coder: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Five small matrix products a matrix and step: costly where a dictionary is large."""
    return MuonAndAdam(learning(coder), config.lr, config.betas)
