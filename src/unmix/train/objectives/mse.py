"""Local reconstruction error in units of the target's variance (Gao et al. 2024, arXiv 2406.04093 §2.1)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse import sparse_decode
from unmix.core.errors import ConfigError
from unmix.train.objectives import Step
from unmix.train.objectives.decoding import without_codes
from unmix.train.objectives.specs import MseSpec


class MSE:
    """mean ‖x − x̂‖² / variance: the batch's fraction of variance unexplained.

    With prefixes, the sum (or mean) of that number over the dictionary's first p latents, for each p, and over all of
    it (Matryoshka, Bussmann et al. 2025, arXiv 2503.17547 §3.2). What fires is chosen once, from all latents.
    """

    name = "mse"

    def __init__(self, spec: MseSpec, coder: CoderConfig) -> None:
        """`ConfigError` for a prefix that is not smaller than the dictionary."""
        self.spec = spec
        if spec.prefixes and spec.prefixes[-1] >= coder.n_latents:
            raise ConfigError(
                f"{coder.name}: the prefix {spec.prefixes[-1]} is not smaller than n_latents = {coder.n_latents}, "
                "which is counted by itself"
            )

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        if not self.spec.prefixes:
            return step.error(step.reconstruction)
        nested = prefix_sums(step, self.spec.prefixes) + without_codes(step).unsqueeze(-2)
        errors = torch.stack([step.error(part) for part in nested.unbind(1)])
        return errors.sum() if self.spec.reduce == "sum" else errors.mean()


def prefix_sums(step: Step, prefixes: tuple[int, ...]) -> Float[Tensor, "rows prefixes_plus_1 d_out"]:
    """The decoder's sum over the first p latents for each p, and over all.

    Entries of a row are sorted by latent, so a prefix is a run of them: one decode with shorter rows, then a running
    sum.
    """
    codes = step.codes
    F, device = codes.n_latents, codes.indices.device
    keys = codes.token_rows() * F + codes.indices
    firsts = torch.tensor((0, *prefixes), device=device)
    starts = torch.searchsorted(keys, (torch.arange(codes.rows, device=device)[:, None] * F + firsts).reshape(-1))
    offsets = torch.cat([starts, codes.offsets[-1:]])
    blocks = sparse_decode(codes.values, step.coder.W_dec, codes.indices, offsets)
    return blocks.view(codes.rows, len(firsts), step.coder.W_dec.shape[1]).cumsum(1)
