"""What trains the gate of gated coders (Rajamanoharan et al. 2024, arXiv 2404.16014 §3.2)."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.activations.selection import ThresholdSelector
from unmix.coder.config import CoderConfig, Gated
from unmix.coder.sparse import sparse_affine, sparse_decode
from unmix.core.errors import ConfigError
from unmix.train.objectives import Step
from unmix.train.objectives.decoding import latent_norms, without_codes
from unmix.train.objectives.specs import GateSpec


class Gate:
    """The error of decoding relu(π) with a frozen decoder, and λ times the mean over tokens of Σ relu(π)·‖w_dec‖.

    Frozen are W_dec, b_dec where it is added, and the skip: the gate learns to reconstruct, the decoder does not learn
    from it. The codes' own error has no gradient through the gate. Costs a second encoder product.
    """

    name = "gate"

    def __init__(self, spec: GateSpec, coder: CoderConfig) -> None:
        """`ConfigError` for a coder without a gate."""
        if not isinstance(coder.activation, Gated):
            raise ConfigError(f"the term gate belongs to gated coders, {coder.name} is {coder.activation.kind}")
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        coder = step.coder
        # A positive factor on the gate changes no sign, so none is needed here.
        selector = ThresholdSelector(0.0, on_scores=True)
        opened, indices, offsets = sparse_affine(step.x, coder.W_enc, coder.b_enc, coder.input_bias(), None, selector)
        guess = sparse_decode(opened, coder.W_dec.detach(), indices, offsets) + without_codes(step).detach()
        value = step.error(guess)
        weight = self.sparsity(step.progress)
        if weight > 0:
            sizes = opened * latent_norms(coder)[indices.long()]
            value = value + weight * sizes.sum() / len(step.x)
        return value

    def sparsity(self, progress: float) -> float:
        """λ when a share `progress` of the training is done."""
        warmup = self.spec.sparsity_warmup
        return self.spec.sparsity * (min(1.0, progress / warmup) if warmup else 1.0)
