"""What several terms need of the decoder: its norms, its part without codes, and the codes of another selection."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig
from unmix.coder.sparse import sparse_decode
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.objectives import Step


def is_crosscoder(config: CoderConfig) -> bool:
    """Whether one code stands for several hooks at once, each read and written."""
    return len(config.reads) > 1 and config.reads == config.writes


def latent_norms(coder: SparseCoder) -> Float[Tensor, " latents"]:
    """Norm of each decoder row, gradients included; in a crosscoder the norms of its parts, one a hook, added up."""
    if not is_crosscoder(coder.config):
        return coder.W_dec.norm(dim=-1)
    first, *others = (part.norm(dim=-1) for part in coder.W_dec.split(list(coder.config.parts()), dim=-1))
    return sum(others, first)


def magnitudes(codes: Codes) -> Float[Tensor, " nnz"]:
    """|f|, with a slope of 1 at 0: a jumprelu code just below its θ is 0, and θ learns from what it would cost."""
    return torch.where(codes.values < 0, -codes.values, codes.values)


def without_codes(step: Step) -> Tensor:
    """What is written where nothing fires: `b_dec` [d_out], with the skip and other coders' parts [rows, d_out]."""
    coder = step.coder
    base: Tensor = coder.b_dec + step.x @ coder.W_skip.T if coder.config.skip else coder.b_dec
    return base if step.others is None else base + step.others


def decoded(step: Step, codes: Codes) -> Float[Tensor, "rows d_out"]:
    """The reconstruction from other codes of the same rows."""
    return sparse_decode(codes.values, step.coder.W_dec, codes.indices, codes.offsets) + without_codes(step)
