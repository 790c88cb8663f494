"""Normalisation of input vectors, and the way back."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from unmix.coder.config import Normalise


def normalise(x: Float[Tensor, "rows d"], rule: Normalise) -> tuple[Float[Tensor, "rows d"], dict[str, Tensor]]:
    """The normalised input, and the per-token `mean` and `std` [rows, 1] that the way back needs."""
    if rule.kind == "none":
        return x, {}
    mean = x.mean(-1, keepdim=True)
    # On an empty batch torch warns of missing degrees of freedom.
    std = x.std(-1, keepdim=True, correction=rule.ddof) if x.shape[0] else mean
    return (x - mean) / (std + rule.eps), {"mean": mean, "std": std}


def denormalise(
    y: Float[Tensor, "rows d"], rule: Normalise, mean: Tensor | None, std: Tensor | None
) -> Float[Tensor, "rows d"]:
    """Undo `normalise` on an output. `ValueError` where the coder needs `mean` and `std` and they are missing."""
    if rule.kind == "none" or not rule.restore:
        return y
    if mean is None or std is None:
        raise ValueError(
            "this coder normalises its input: decoding needs the mean and std of each token, and these codes "
            "carry no context"
        )
    return y * (std + rule.eps if rule.eps_back else std) + mean
