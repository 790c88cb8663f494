"""Normalisation of input vectors, and the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.config import Normalise

FIXED = ("norm_mean", "norm_scale")
"""The stored vectors of `standardise`, both [d_in]."""


def normalise(
    x: Float[Tensor, "rows d"], rule: Normalise, fixed: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "rows d"], dict[str, Tensor]]:
    """The normalised input, and the per-token `mean` and `std` [rows, 1] that the way back needs."""
    if rule.kind == "none":
        return x, {}
    if rule.kind == "standardise":
        return (x - fixed["norm_mean"]) * fixed["norm_scale"], {}
    if rule.kind == "constant_norm":
        std = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        # A token of zeros has no direction: it stays zeros rather than becoming NaN.
        return torch.where(std > 0, x / std, 0.0), {"std": std}
    mean = x.mean(-1, keepdim=True)
    # On an empty batch torch warns of missing degrees of freedom.
    std = x.std(-1, keepdim=True, correction=rule.ddof) if x.shape[0] else mean
    return (x - mean) / (std + rule.eps), {"mean": mean, "std": std}


def denormalise(
    y: Float[Tensor, "rows d"], rule: Normalise, mean: Tensor | None, std: Tensor | None, fixed: Mapping[str, Tensor]
) -> Float[Tensor, "rows d"]:
    """Undo `normalise` on an output. `ValueError` where the coder needs a token's `mean` or `std` and it is missing."""
    if rule.kind == "none" or not rule.restore:
        return y
    if rule.kind == "standardise":
        return y / fixed["norm_scale"] + fixed["norm_mean"]
    if std is None or (mean is None and rule.kind == "layer_norm"):
        raise ValueError(
            "this coder normalises its input: decoding needs the mean and std of each token, and these codes "
            "carry no context"
        )
    y = y * (std + rule.eps if rule.eps_back else std)
    return y if mean is None else y + mean
