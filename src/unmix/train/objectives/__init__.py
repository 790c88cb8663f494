"""An objective is a list of named, weighted terms; one small file a term, all of the same shape.

Every term sees one `Step` and returns one scalar. Local training is a list of terms, not a trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.plugins import Registry
from unmix.train.objectives.predictions import Predictions
from unmix.train.objectives.specs import TermSpec


@dataclass(frozen=True)
class ModelStep:
    """What the language model did with and without the coder, at the positions that count."""

    predictions: Predictions | None
    """Where kl or ce is asked for."""
    later: Mapping[str, tuple[Tensor, Tensor]]
    """By downstream hook: activations [rows, d] of the model as it is (no gradients), and spliced."""
    sharers: Mapping[str, int]
    """By term: how many coders in the pass have it."""


@dataclass(frozen=True)
class Step:
    """What a term may look at: one batch in the coder's inner space (normalised and scaled)."""

    coder: SparseCoder
    x: Tensor
    """Prepared input [rows, d_in]."""
    target: Tensor
    """What the reconstruction should be [rows, d_out], in the same space."""
    codes: Codes
    reconstruction: Tensor
    variance: float
    """Mean squared distance of a target from the mean target, from the first sample: the unit of the loss."""
    dead: Tensor
    """Ids of dead latents [n_dead]."""
    progress: float = 0.0
    """Share of the training that is done, for annealing."""
    model: ModelStep | None = None
    """Where an objective looks at the spliced model."""
    others: Tensor | None = None
    """What other coders write to the same hooks [rows, d_out], where coders are trained as a set."""
    weights: Tensor | None = None
    """What each squared element of the error counts [d_out]; None: 1."""

    def error(self, reconstruction: Tensor) -> Tensor:
        """mean ‖target − reconstruction‖² / variance, over rows: the unit of every local loss."""
        if self.weights is None:
            # One pass forward and one backward, where the steps one by one make four.
            squares = functional.mse_loss(reconstruction, self.target, reduction="sum")
        else:
            squares = ((self.target - reconstruction).square() * self.weights).sum()
        return squares / (len(self.target) * self.variance)

    def fvu(self) -> float:
        """The batch's fraction of variance unexplained."""
        with torch.no_grad():
            return float(self.error(self.reconstruction))


class Term(Protocol):
    """One weighted part of the loss. Built from its spec and the coder's config."""

    name: str
    spec: TermSpec

    def __call__(self, step: Step) -> Tensor:
        """The unweighted value, a scalar."""
        ...


OBJECTIVES = Registry(
    "unmix.objectives",
    "objective",
    {
        "mse": "unmix.train.objectives.mse:MSE",
        "l1": "unmix.train.objectives.l1:L1",
        "l0": "unmix.train.objectives.l0:L0",
        "auxk": "unmix.train.objectives.auxk:AuxK",
        "multi_topk": "unmix.train.objectives.multi_topk:MultiTopK",
        "gate": "unmix.train.objectives.gate:Gate",
        "kl": "unmix.train.objectives.model:KL",
        "ce": "unmix.train.objectives.model:CE",
        "downstream": "unmix.train.objectives.model:Downstream",
    },
)
OF_MODEL = ("kl", "ce", "downstream")
"""Terms that need the spliced model."""


def make_term(spec: Any, coder: CoderConfig) -> Term:
    """The term behind a spec. `ConfigError` where it means nothing for this coder."""
    term: Term = OBJECTIVES.get(spec.term)(spec, coder)
    return term


def total(terms: Sequence[Term], step: Step) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum and each term's unweighted value; terms whose time has not come are left out."""
    loss = torch.zeros((), dtype=step.reconstruction.dtype, device=step.reconstruction.device)
    values: dict[str, float] = {}
    for term in terms:
        factor = term.spec.weight * term.spec.ramp(step.progress)
        if factor == 0:
            continue
        value = term(step)
        values[term.name] = float(value.detach())
        loss = loss + factor * value
    return loss, values
