"""The plain reference: dense encode and decode by ordinary autograd. Slow, obvious, and what the rest must equal."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from unmix.coder.encoder import AffineEncoder
from unmix.coder.sparse_coder import SparseCoder


def encode_dense(coder: SparseCoder, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows latents"]:
    """Dense codes of `x`, gradients by autograd."""
    if not isinstance(coder.encoder, AffineEncoder):
        raise TypeError(f"no dense reference for {type(coder.encoder).__name__}")
    s, _ = coder.prepare(x)
    z = coder.encoder.pre_activations(coder, s)
    return coder.encoder.rule.dense(z, coder.gate_factor(), coder.encoder.extra(coder), coder.training)


def decode_dense(
    coder: SparseCoder, dense: Float[Tensor, "rows latents"], x: Float[Tensor, "rows d_in"]
) -> Float[Tensor, "rows d_out"]:
    """Output of dense codes; `x` gives back the context (mean, std, skip input)."""
    _, context = coder.prepare(x)
    return coder.finish(dense @ coder.W_dec + coder.b_dec, **context)


def forward_dense(coder: SparseCoder, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
    """Reconstruction through dense codes."""
    return decode_dense(coder, encode_dense(coder, x), x)
