"""ReLU codes: every positive pre-activation."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.activations.selection import Selector, ThresholdSelector
from unmix.coder.config import ReLU


class ReLUActivation:
    """max(z, 0)."""

    def __init__(self, config: ReLU) -> None:
        self.config = config

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """None beyond the affine ones."""
        return {}

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """Entries above zero: a decoder norm in the gate changes no sign, and one of zero must not hide a latent."""
        return ThresholdSelector(0.0, on_scores=True)

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """The selected pre-activations are positive already."""
        return z

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """max(z, 0)."""
        return z.relu()
