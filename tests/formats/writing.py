"""What the tests of the writable formats share: coders of every kind with weights that expose mistakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder

D, F = 6, 20


def inputs(rows: int = 16, d: int = D) -> Tensor:
    """`[rows, d]`, of different means and scales."""
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(9))
    return x * torch.linspace(0.5, 3.0, rows)[:, None] + 0.4


def make(activation: Any, seed: int = 5, **fields: Any) -> SparseCoder:
    """A coder with random weights, decoder rows of different norms, and thresholds that gate."""
    config = CoderConfig(
        **{"reads": ("blocks.2.resid_post",), "d_in": D, "n_latents": F, "activation": activation} | fields
    )
    coder = SparseCoder(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=rng) - 0.1)
            if name in ("threshold", "gate_scale", "norm_scale"):
                parameter.abs_().add_(0.3)
        coder.W_dec.mul_(torch.linspace(0.5, 2, config.n_latents)[:, None])
    return coder


@torch.no_grad()
def run(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense codes and outputs."""
    codes = coder.encode(x)
    return codes.dense(), coder.decode(codes)


def close(found: Tensor, expected: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
