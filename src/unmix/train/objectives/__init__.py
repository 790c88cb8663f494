"""An objective is a list of named, weighted terms; one small file a term, all of the same shape.

Every term sees one `Step` and returns one scalar. Local training is a list of terms, not a trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.sparse_coder import SparseCoder


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


class Term(Protocol):
    """One weighted part of the loss."""

    name: str
    weight: float

    def __call__(self, step: Step) -> Tensor:
        """The unweighted value, a scalar."""
        ...


def total(terms: list[Term], step: Step) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum and each term's unweighted value."""
    loss = torch.zeros((), dtype=step.reconstruction.dtype, device=step.reconstruction.device)
    values: dict[str, float] = {}
    for term in terms:
        value = term(step)
        values[term.name] = float(value.detach())
        loss = loss + term.weight * value
    return loss, values
