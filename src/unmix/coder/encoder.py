"""The encoder is a strategy: one door for affine coders now, iterative and sequence-reading ones later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.nn import functional

from unmix.coder.activations import make_activation
from unmix.coder.codes import Codes
from unmix.coder.sparse import sparse_affine
from unmix.core.plugins import Registry

if TYPE_CHECKING:
    from unmix.coder.sparse_coder import SparseCoder


ENCODERS = Registry(
    "unmix.encoders",
    "encoder",
    {
        "matching_pursuit": "unmix.coder.encoders.matching_pursuit:MatchingPursuitEncoder",
        "temporal": "unmix.coder.encoders.temporal:TemporalEncoder",
    },
)
"""Encoders that are not affine, by the kind of activation that asks for them."""


class Encoder(Protocol):
    """Turns prepared input (normalised and scaled, pre-bias not yet subtracted) into codes."""

    sequential: bool
    """Whether it looks at the tokens before; then `Codes.context["predicted"]` is what decoding adds back."""

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """Initial extra tensors of the coder, by name (trained if they are floating and per latent)."""
        ...

    def codes(self, coder: SparseCoder, x: Tensor, context: Tensor | None) -> Codes:
        """Codes of `x [rows, d_in]`; `context` [rows] numbers the sequences, for encoders that look at them."""
        ...

    def pre_activations(self, coder: SparseCoder, x: Tensor) -> Tensor:
        """Dense pre-activations `[rows, n_latents]`, before any gate."""
        ...


class AffineEncoder:
    """z = W_enc (x − b_pre) + b_enc, then the activation rule."""

    sequential = False

    def __init__(self, config: Any) -> None:
        self.config = config
        self.rule = make_activation(config)

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """Those of the activation."""
        return self.rule.parameters(n_latents)

    def codes(self, coder: SparseCoder, x: Tensor, context: Tensor | None) -> Codes:
        """The sparse path: only selected pairs leave the scored tile."""
        scale = coder.gate_factor()
        extra = self.extra(coder)
        selector = self.rule.selector(extra, x.shape[0], coder.training)
        z, indices, offsets = sparse_affine(x, coder.W_enc, coder.b_enc, coder.input_bias(), scale, selector)
        values = self.rule.values(z, indices, scale, extra)
        return Codes(indices, values, offsets, coder.n_latents, (x.shape[0],), selector.uniform_k)

    def extra(self, coder: SparseCoder) -> dict[str, Tensor]:
        """What the rule may look at: its own tensors and the encoder's bias."""
        return {**coder.extra(), "b_enc": coder.b_enc}

    def pre_activations(self, coder: SparseCoder, x: Tensor) -> Tensor:
        """Dense, by plain torch; gradients flow."""
        bias = coder.input_bias()
        return functional.linear(x if bias is None else x - bias, coder.W_enc, coder.b_enc)


def make_encoder(config: Any) -> Encoder:
    """The encoder behind an activation config: affine, unless the kind has one of its own."""
    if config.kind in ENCODERS.names():
        made: Encoder = ENCODERS.get(config.kind)(config)
        return made
    return AffineEncoder(config)
