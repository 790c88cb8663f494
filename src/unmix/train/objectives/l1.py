"""L1 and Lp penalties on codes, each latent times its decoder norm (Anthropic, April 2024 update)."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.train.objectives import Step
from unmix.train.objectives.decoding import latent_norms, magnitudes
from unmix.train.objectives.specs import L1Spec


class L1:
    """Mean over tokens of Σ (|f|·‖w_dec‖)^p; p may fall while training (p-annealing, Karvonen et al. 2024).

    In a crosscoder ‖w_dec‖ is the sum over its hooks (Lindsey et al. 2024).
    """

    name = "l1"

    def __init__(self, spec: L1Spec, coder: CoderConfig) -> None:
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        codes, p = step.codes, self.p(step.progress)
        size = magnitudes(codes)
        if self.spec.norms:
            size = size * latent_norms(step.coder)[codes.indices.long()]
        # Below p = 1 the slope at 0 is infinite: only what fires is penalised.
        size = size if p == 1.0 else size[size > 0].pow(p)
        return size.sum() / codes.rows

    def p(self, progress: float) -> float:
        """The exponent when a share `progress` of the training is done."""
        end = self.spec.p if self.spec.p_end is None else self.spec.p_end
        return self.spec.p + (end - self.spec.p) * progress
