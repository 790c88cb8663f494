"""IdentityCoder: a model's own neurons, or any orthogonal basis, seen as a coder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmix.coder.config import CoderConfig, Identity
from unmix.coder.sparse_coder import SparseCoder


class IdentityCoder(SparseCoder):
    """Latent i is coordinate i (or row i of `basis`); the reconstruction is exact.

    Every tool that takes a coder takes this one, so baselines run through the same code.
    """

    def __init__(self, hook: str, width: int, basis: Float[Tensor, "width width"] | None = None) -> None:
        """`basis` must be square, its rows orthonormal to 1e-4 (`ValueError` otherwise)."""
        rows = torch.eye(width) if basis is None else basis
        if rows.shape != (width, width):
            raise ValueError(f"basis is {list(rows.shape)}, expected [{width}, {width}]")
        if not torch.allclose(rows @ rows.T, torch.eye(width, dtype=rows.dtype, device=rows.device), atol=1e-4):
            raise ValueError("basis rows are not orthonormal")
        config = CoderConfig(
            name="", reads=(hook,), d_in=width, n_latents=width, activation=Identity(), pre_bias="none"
        )
        super().__init__(config)
        self.W_enc = nn.Parameter(rows.clone())
        self.W_dec = nn.Parameter(rows.clone())
