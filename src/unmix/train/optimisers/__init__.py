"""Optimisers by name; one small file each. All are `torch.optim.Optimizer`s whose state lies beside the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from unmix.core.plugins import Registry
from unmix.train.config import OptimConfig

Make = Callable[[nn.Module, OptimConfig], torch.optim.Optimizer]

OPTIMISERS = Registry(
    "unmix.optimisers",
    "optimiser",
    {
        "adam": "unmix.train.optimisers.adam:make",
        "signum": "unmix.train.optimisers.signum:make",
        "schedule_free": "unmix.train.optimisers.schedule_free:make",
        "muon": "unmix.train.optimisers.muon:make",
        "adam8bit": "unmix.train.optimisers.adam8bit:make",
    },
)


@runtime_checkable
class Averaging(Protocol):
    """An optimiser that trains at one point and is used at another."""

    def finish(self) -> None:
        """Put the parameters where they are used from now on."""
        ...


def make_optimiser(coder: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that the config names, over every parameter of `coder` that learns.

    `ConfigError` where it cannot go with other fields, `MachineError` where its library is missing.
    """
    make: Make = OPTIMISERS.get(config.optimiser)
    return make(coder, config)


def finish(optimiser: torch.optim.Optimizer) -> None:
    """To be called once, after the last step."""
    if isinstance(optimiser, Averaging):
        optimiser.finish()


def learning(coder: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [p for p in coder.parameters() if p.requires_grad]
