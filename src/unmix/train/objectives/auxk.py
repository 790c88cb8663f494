"""AuxK: dead latents explain what the living ones left over (Gao et al. 2024, arXiv 2406.04093 appendix A.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from unmix.coder.activations.selection import TopKSelector
from unmix.coder.config import CoderConfig
from unmix.coder.sparse import sparse_affine, sparse_decode
from unmix.train.objectives import Step
from unmix.train.objectives.specs import AuxKSpec


class AuxK:
    """Σ‖e − ê‖² / Σ‖e − ē‖² with e the detached residual and ê from the best `k_aux` dead latents, without b_dec.

    The best are those with the largest gate, the pre-activation in the coder's gate space, as its codes are chosen.
    0 where no latent is dead or the residual is constant. The encoder learns from it too: gradients run through
    the dead latents' pre-activations.
    """

    name = "auxk"

    def __init__(self, spec: AuxKSpec, coder: CoderConfig) -> None:
        self.spec = spec
        self.k_aux = spec.k or max(1, coder.d_in // 2)

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        zero = step.reconstruction.new_zeros(())
        if step.dead.numel() == 0:
            return zero
        coder = step.coder
        residual = (step.target - step.reconstruction).detach()
        spread = (residual - residual.mean(0)).square().sum()
        if not bool(spread > 0):
            return zero
        bias, scale = coder.input_bias(), coder.gate_factor()
        k = min(self.k_aux, step.dead.numel())
        values, indices, offsets = sparse_affine(
            step.x,
            coder.W_enc[step.dead],
            coder.b_enc[step.dead],
            None if bias is None else bias.detach(),
            None if scale is None else scale[step.dead],
            TopKSelector(k),
        )
        guess = sparse_decode(values.relu(), coder.W_dec[step.dead], indices, offsets)
        loss = (residual - guess).square().sum() / spread
        return torch.where(torch.isfinite(loss), loss, zero)
