"""What is selected: the settings that kernels and their plain twins share."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TopRule:
    """The k largest of each token: of the gate, of its size (`magnitude`), or of its ReLU (`positive`)."""

    k: int
    magnitude: bool = False
    positive: bool = False

    def gate(self, z: Tensor, scale: Tensor | None) -> Tensor:
        """What is ranked; `scale` broadcasts against `z`."""
        gate = z if scale is None else z * scale
        if self.magnitude:
            return gate.abs()
        return gate.relu() if self.positive else gate


@dataclass(frozen=True)
class Found:
    """Selected pairs in CSR order: tokens in order, latent ids ascending inside a token."""

    z: Float[Tensor, " nnz"]
    """float32 pre-activations."""
    indices: Int[Tensor, " nnz"]
    """int32 latent ids."""
    offsets: Int[Tensor, " rows_plus_1"]
    """int64."""
    again: int = 0
    """Tokens that the plain path had to do, because the candidates did not settle them."""
