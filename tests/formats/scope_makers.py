"""Small checkpoints for the tests of the scope families, and the plain maths they are held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unmix.coder import SparseCoder

D, F = 6, 20


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def weights(d_in: int = D, d_out: int = D, seed: int = 0) -> dict[str, Tensor]:
    """`W_enc [d_in, F]`, `b_enc`, `W_dec [F, d_out]` of rows of unequal norm, `b_dec`."""
    return {
        "W_enc": normal(d_in, F, seed=seed), "b_enc": normal(F, seed=seed + 1, scale=0.3),
        "W_dec": normal(F, d_out, seed=seed + 2) * torch.linspace(0.3, 2.0, F)[:, None],
        "b_dec": normal(d_out, seed=seed + 3),
    }  # fmt: skip


def thresholds(low: float = 0.2, high: float = 2.0) -> Tensor:
    """One a latent."""
    return torch.linspace(low, high, F)


def inputs(width: int = D, seed: int = 9) -> Tensor:
    """16 rows."""
    return normal(16, width, seed=seed, scale=1.5)


def put(path: Path, tensors: dict[str, Tensor], **configs: Any) -> Path:
    """A safetensors file, and JSON files beside it (`config={…}` becomes `config.json`); returns the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    for name, tree in configs.items():
        (path.parent / f"{name}.json").write_text(json.dumps(tree))
    return path.parent


def jump(z: Tensor, theta: Tensor, gate: Tensor | None = None) -> Tensor:
    """z where the gate is above θ; fails where that decides nothing."""
    kept = torch.where((z if gate is None else gate) > theta, z.relu(), 0.0)
    assert 0 < (kept > 0).sum() < (z > 0).sum()
    return kept


@torch.no_grad()
def run(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense codes and output."""
    codes = coder.encode(x)
    return codes.dense(), coder.decode(codes)


def close(found: Tensor, expected: Tensor) -> bool:
    """Within 1e-5 of the largest value."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
