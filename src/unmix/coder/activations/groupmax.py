"""Group-max codes: the best latent of each of k groups (EleutherAI's sparsify)."""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.coder.activations.selection import GroupMaxSelector, Selector
from unmix.coder.config import GroupMax


class GroupMaxActivation:
    """The largest of each of k contiguous groups, cut at 0; ties go to the lowest latent id."""

    def __init__(self, config: GroupMax) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """None beyond the affine ones."""
        return {}

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """One entry of each group."""
        return GroupMaxSelector(self.config.k)

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """max(z, 0): a group with nothing positive keeps an explicit zero."""
        return z.relu()

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """Mask the best of each group, then ReLU."""
        gate = (z if scale is None else z * scale).detach()
        grouped = gate.unflatten(-1, (self.config.k, -1)).relu()
        first = grouped.argmax(-1, keepdim=True)
        mask = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, first, True).flatten(-2)
        return torch.where(mask, z, 0.0).relu()
