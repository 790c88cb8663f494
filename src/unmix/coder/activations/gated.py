"""Gated codes (Rajamanoharan et al. 2024, arXiv 2404.16014 §3): one matrix decides which latents fire and how far."""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.coder.activations.selection import GatedSelector, Selector
from unmix.coder.config import Gated


class GatedActivation:
    """1[π > 0]·relu(exp(r_mag)·(π − b_enc) + b_mag), where π is the pre-activation and b_enc the gate's bias."""

    def __init__(self, config: Gated) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """`r_mag` [F], log of the magnitude path's factor, and `b_mag` [F], its bias."""
        return {"r_mag": torch.zeros(n_latents), "b_mag": torch.zeros(n_latents)}

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """Where gate and magnitude are both above zero: a positive factor on the gate changes neither."""
        factor, bias = self._line(extra)
        return GatedSelector(factor.detach(), bias.detach())

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """The magnitudes of the selected pairs; no gradient flows through the gate."""
        ids = indices.long()
        return (extra["r_mag"].exp()[ids] * (z - extra["b_enc"][ids]) + extra["b_mag"][ids]).relu()

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """The same on dense pre-activations."""
        return torch.where(z > 0, (extra["r_mag"].exp() * (z - extra["b_enc"]) + extra["b_mag"]).relu(), 0.0)

    def _line(self, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factor and bias that take π to the magnitude."""
        factor = extra["r_mag"].exp()
        return factor, extra["b_mag"] - factor * extra["b_enc"]
