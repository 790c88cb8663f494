"""Where the sparse path hands over to kernels: its own functions' arguments in, its own results out, or None."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.activations.selection import Selector, ThresholdSelector, TopKSelector
from unmix.coder.kernels.decode import decode
from unmix.coder.kernels.encode import threshold_codes, top_codes
from unmix.coder.kernels.gradients import latent_gradients
from unmix.coder.kernels.launching import usable
from unmix.coder.kernels.rules import TopRule


def select(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, selector: Selector
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`(pre-activations, indices, offsets)` of what the selector keeps; None where there is no kernel for that."""
    if not usable(x, W, b) or x.dtype != W.dtype:
        return None
    if type(selector) is TopKSelector:
        rule = TopRule(selector.uniform_k or 0, selector.magnitude, selector.relu_first and not selector.magnitude)
        found = top_codes(x, W, b, scale, rule)
    elif type(selector) is ThresholdSelector:
        found = threshold_codes(x, W, b, scale, selector.floor, selector.on_scores)
    else:
        return None
    return found.z.to(x.dtype), found.indices, found.offsets


def rows_summed(table: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor | None:
    """`sparse.bag` over decoder or encoder rows: a token's weighted rows."""
    if not usable(table, weights):
        return None
    return decode(weights.detach(), table.detach(), ids, offsets, dtype=table.dtype)


def decode_gradients(
    grad_out: Tensor, values: Tensor, W_dec: Tensor, indices: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Gradients of a decode by values and weights."""
    if not usable(grad_out, values, W_dec):
        return None
    found = latent_gradients(indices, offsets, values, grad_out, W_dec, None, None, len(W_dec), False)
    return None if found.dec is None else (found.z.to(values.dtype), found.dec.to(W_dec.dtype))


def affine_gradients(
    grad_z: Tensor, x: Tensor, n_latents: int, indices: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Gradients of selected pre-activations by the encoder's weights and bias."""
    if not usable(grad_z, x):
        return None
    found = latent_gradients(indices, offsets, grad_z, None, None, x, grad_z, n_latents, False)
    return None if found.enc is None else (found.enc.to(x.dtype), found.bias.to(x.dtype))
