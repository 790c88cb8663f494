"""Where training rows come from: any batch of any step, without history (decision 13)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unmix.data.order import Order


class ActivationSource(Protocol):
    """Rows of activations addressed by training step."""

    hash: str
    """Content hash: two sources with one hash give the same rows."""

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        ...

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """`(input [size, d_in], target [size, d_out])` of a step, float32."""
        ...


class TensorSource:
    """Rows held in memory: for tests, toy data, and modules that are not language models."""

    def __init__(
        self,
        x: Float[Tensor, "rows d_in"],
        target: Float[Tensor, "rows d_out"] | None = None,
        seed: int = 0,
        block: int = 65536,
    ) -> None:
        self.x = x
        self.target = x if target is None else target
        self._order = Order(seed, x.shape[0], block)
        self.hash = f"tensor-{x.shape[0]}x{x.shape[1]}-{float(x.double().sum()):.12g}-{seed}"

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.x.shape[0]

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Rows of the seeded order."""
        ids = torch.from_numpy(np.asarray(self._order.batch(step, size), dtype=np.int64))
        return self.x[ids].float(), self.target[ids].float()
