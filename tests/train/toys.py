"""Small sources and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.train.config import OptimConfig
from unmix.train.source import TensorSource
from unmix.train.trainer import Trainer

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 3},
    "batchtopk": {"kind": "batchtopk", "k": 3},
    "relu": {"kind": "relu"},
    "jumprelu": {"kind": "jumprelu", "initial_threshold": 0.3, "bandwidth": 0.5},
}


def planted(rows: int, d: int, atoms: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`(x [rows, d], dictionary [atoms, d])`: every row is a positive sum of k atoms of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=-1)
    ids = torch.rand(rows, atoms, generator=generator).topk(k).indices
    return (dictionary[ids] * (0.5 + torch.rand(rows, k, 1, generator=generator))).sum(1), dictionary


def coder_config(kind: str = "topk", d: int = 8, n: int = 16, **changes: Any) -> CoderConfig:
    """A small coder of one activation."""
    return CoderConfig(d_in=d, n_latents=n, activation=ACTIVATIONS[kind], **changes)  # pyright: ignore[reportArgumentType]


def make_trainer(folder: Path, kind: str = "topk", x: Tensor | None = None, key: str = "key", **optim: Any) -> Trainer:
    """30 steps of 32 rows unless told otherwise."""
    settings = {
        "batch": 32, "tokens": 960, "init_rows": 64, "lr": 5e-3, "checkpoint_every": 7, "log_every": 3, **optim,
    }  # fmt: skip
    rows = planted(400, 8, 12, 2)[0] if x is None else x
    return Trainer(coder_config(kind, d=rows.shape[1]), TensorSource(rows), OptimConfig(**settings), folder, key)
