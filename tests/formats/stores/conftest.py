"""Tensors here are tiny. Classes of old trainers exist only while a file is written, as on a reader's machine."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from torch_settings import torch_settings

__all__ = ["torch_settings"]


@pytest.fixture
def trainer_class(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Any]]:
    """Make a class that says it is from another package, `trainer_class("sae_training.config", "Config")`."""

    def make(module: str, name: str, base: type = object) -> type[Any]:
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        made = type(name, (base,), {"__module__": module, "__qualname__": name})
        setattr(sys.modules[module], name, made)
        return made

    return make


@pytest.fixture
def old_group(trainer_class: Callable[..., type[Any]]) -> Any:
    """What the trainers of spring 2024 pickled whole: a group of two coders, with a config each."""
    import torch

    config = trainer_class("sae_training.config", "LanguageModelSAERunnerConfig")()
    config.hook_point, config.d_in, config.dtype = "blocks.3.hook_resid_pre", 4, torch.float32
    config.device, config.store_batch_size, config.lr = torch.device("cpu"), (32,), 3e-4
    coder_class = trainer_class("sae_training.sparse_autoencoder", "SparseAutoencoder", nn.Module)
    group = trainer_class("sae_training.sae_group", "SAEGroup")()
    group.cfg, group.autoencoders = config, []
    for _ in range(2):
        coder = coder_class()
        coder.cfg = config
        coder.W_enc = nn.Parameter(torch.randn(4, 6))
        coder.b_enc = nn.Parameter(torch.randn(6))
        coder.activation_fn = nn.ReLU()
        group.autoencoders.append(coder)
    return group
