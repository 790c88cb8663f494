"""Adam with moments in eight bits (Dettmers et al. 2021, arXiv 2110.02861), of the library bitsandbytes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from unmix.core.errors import missing_extra
from unmix.train.config import OptimConfig
from unmix.train.optimisers import learning


def make(coder: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """`MachineError` where the library is not installed."""
    try:
        library: Any = importlib.import_module("bitsandbytes")
    except ImportError:
        raise missing_extra("bitsandbytes", "adam8bit", "optimiser adam8bit") from None
    optimiser: torch.optim.Optimizer = library.optim.Adam8bit(learning(coder), lr=config.lr, betas=config.betas)
    return optimiser
