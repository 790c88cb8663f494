"""Local reconstruction error in units of the target's variance (Gao et al. 2024, arXiv 2406.04093 §2.1)."""

from __future__ import annotations

from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.train.objectives import Step
from unmix.train.objectives.specs import MseSpec


class MSE:
    """mean ‖x − x̂‖² / variance: the batch's fraction of variance unexplained."""

    name = "mse"

    def __init__(self, spec: MseSpec, coder: CoderConfig) -> None:
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        return (step.target - step.reconstruction).square().sum(-1).mean() / step.variance
