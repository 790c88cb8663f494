"""Top-k codes (Gao et al. 2024, arXiv 2406.04093 §2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.coder.activations.selection import Selector, TopKSelector, top_lowest
from unmix.coder.config import TopK


class TopKActivation:
    """The k largest of each token; ties go to the lowest latent id."""

    def __init__(self, config: TopK) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """None beyond the affine ones."""
        return {}

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """k entries of each row."""
        return TopKSelector(self.config.k, self.config.magnitude, self.config.relu == "before")

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """ReLU of the selected values unless codes are signed; zeros stay as explicit entries."""
        return z if self.config.relu == "none" else z.relu()

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """Mask the k best, then ReLU."""
        gate = z if scale is None else z * scale
        if self.config.magnitude:
            gate = gate.abs()
        elif self.config.relu == "before":
            gate = gate.relu()
        mask = torch.zeros_like(z, dtype=torch.bool).scatter(-1, top_lowest(gate.detach(), self.config.k), True)
        kept = torch.where(mask, z, 0.0)
        return kept if self.config.relu == "none" else kept.relu()
