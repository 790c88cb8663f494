"""Batch top-k codes (Bussmann et al. 2024, arXiv 2412.06410): k·T entries a batch, a threshold at inference."""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.coder.activations.selection import BatchTopKSelector, Selector, ThresholdSelector
from unmix.coder.config import BatchTopK
from unmix.core.errors import ConfigError

UNCALIBRATED = -1.0


class BatchTopKActivation:
    """Training mode selects over the batch; evaluation mode keeps what lies above the learnt threshold."""

    def __init__(self, config: BatchTopK) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """`threshold` []: running mean of the smallest kept value; −1 until it was calibrated."""
        return {"threshold": torch.tensor(UNCALIBRATED)}

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """Batch selection while training, the threshold otherwise."""
        if training:
            return BatchTopKSelector(self.config.k, rows)
        return ThresholdSelector(self._threshold(extra))

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """The selected pre-activations are positive already."""
        return z

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """Rank the positive entries of the whole batch, or compare with the threshold."""
        gate = (z if scale is None else z * scale).detach()
        if not training:
            return torch.where(gate > self._threshold(extra), z, 0.0)
        flat = gate.reshape(-1)
        best = flat.sort(descending=True, stable=True).indices[: self.config.k * gate.shape[0]]
        mask = torch.zeros_like(flat, dtype=torch.bool).scatter(0, best, True) & (flat > 0)
        return torch.where(mask.view_as(z), z, 0.0)

    def _threshold(self, extra: dict[str, Tensor]) -> float:
        threshold = float(extra["threshold"])
        if threshold < 0:
            raise ConfigError(
                "this batchtopk coder's threshold was never calibrated: train it, or call coder.train() "
                "to select over the batch"
            )
        return threshold
