"""The encoder is a strategy: one door for affine coders now, iterative and sequence-reading ones later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn import functional

from unmix.coder.activations import make_activation
from unmix.coder.codes import Codes
from unmix.coder.sparse import sparse_affine

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder


class Encoder(Protocol):
    """Turns prepared input (normalised and scaled, pre-bias not yet subtracted) into codes."""

    def codes(self, coder: SparseCoder, x: Tensor, context: Tensor | None) -> Codes:
        """Codes of `x [rows, d_in]`; `context` is for encoders that look at the sequence."""
        ...

    def pre_activations(self, coder: SparseCoder, x: Tensor) -> Tensor:
        """Dense pre-activations `[rows, n_latents]`, before any gate."""
        ...


class AffineEncoder:
    """z = W_enc (x − b_pre) + b_enc, then the activation rule."""

    def __init__(self, config: object) -> None:
        self.rule = make_activation(config)

    def codes(self, coder: SparseCoder, x: Tensor, context: Tensor | None) -> Codes:
        """The sparse path: only selected pairs leave the scored tile."""
        scale = coder.gate_scale()
        selector = self.rule.selector(coder.extra(), x.shape[0], coder.training)
        z, indices, offsets = sparse_affine(x, coder.W_enc, coder.b_enc, coder.input_bias(), scale, selector)
        values = self.rule.values(z, indices, scale, coder.extra())
        return Codes(indices, values, offsets, coder.n_latents, (x.shape[0],), selector.uniform_k)

    def pre_activations(self, coder: SparseCoder, x: Tensor) -> Tensor:
        """Dense, by plain torch; gradients flow."""
        bias = coder.input_bias()
        return functional.linear(x if bias is None else x - bias, coder.W_enc, coder.b_enc)
