"""Identity codes: every latent, signed."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.activations.selection import AllSelector, Selector
from unmix.coder.config import Identity


class IdentityActivation:
    """z itself. Dense by nature: use it for baselines on a model's own neurons."""

    def __init__(self, config: Identity) -> None:
        self.config = config
        self._n = 0

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """None; remembers the width for the selector."""
        self._n = n_latents
        return {}

    def selector(self, extra: dict[str, Tensor], rows: int, training: bool) -> Selector:
        """Whole rows."""
        return AllSelector(self._n)

    def values(self, z: Tensor, indices: Tensor, scale: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """Unchanged."""
        return z

    def dense(self, z: Tensor, scale: Tensor | None, extra: dict[str, Tensor], training: bool) -> Tensor:
        """Unchanged."""
        return z
