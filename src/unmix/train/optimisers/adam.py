"""Adam (Kingma & Ba 2014, arXiv 1412.6980), torch's own, fused."""

from __future__ import annotations

import torch
from torch import nn

from unmix.train.config import OptimConfig
from unmix.train.optimisers import learning


def make(coder: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """One pass over memory a step."""
    return torch.optim.Adam(learning(coder), lr=config.lr, betas=config.betas, fused=True)
