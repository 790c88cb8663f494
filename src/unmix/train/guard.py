"""Numbers that are none: found before any weight is touched, told with the batch that they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unmix.core.errors import NonFiniteError
from unmix.train.objectives import Step

NAMED_ROWS = 8


class FaultError(NonFiniteError):
    """NaN or infinity in a training step: whose, of what, and in which rows of the batch."""

    def __init__(self, coder: str, what: str, value: float, step: int, lr: float, rows: Sequence[int]) -> None:
        """`step` counts from 1."""
        self.coder, self.what, self.value, self.step, self.lr = coder, what, value, step, lr
        self.rows = list(rows)
        super().__init__(f"{coder}: the {what} is {value} at step {step} (lr {lr:g})")

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "coder": self.coder, "what": self.what, "value": str(self.value), "step": self.step, "lr": self.lr,
            "rows": self.rows,
        }  # fmt: skip


@runtime_checkable
class Traceable(Protocol):
    """A feed whose rows have a place in the text."""

    def places(self, index: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Where some rows of the batch of step `index` come from."""
        ...


def finite(x: Tensor) -> bool:
    """Whether every number is. One sum where all is well; a sum that overflows is looked at closely."""
    return math.isfinite(float(x.detach().sum())) or bool(torch.isfinite(x).all())


@torch.no_grad()
def bad_rows(*tensors: Tensor) -> list[int]:
    """The first rows that hold a number that is none."""
    wrong = torch.stack([~torch.isfinite(t).all(-1) for t in tensors]).any(0)
    return wrong.nonzero().squeeze(-1)[:NAMED_ROWS].tolist()


@torch.no_grad()
def loudest_rows(batch: Step) -> list[int]:
    """Rows whose error is no number, or else the one with the largest."""
    errors = (batch.target - batch.reconstruction).square().sum(-1)
    found = bad_rows(errors[:, None])
    return found or ([int(errors.argmax())] if errors.numel() else [])


def told(faults: Mapping[str, FaultError], places: Mapping[str, list[dict[str, int]]]) -> str:
    """What went wrong, where, and what usually helps."""
    fault = next(iter(faults.values()))
    text = str(fault)
    if places.get(fault.coder):
        spots = [f"context {p['context']} position {p['position']}" for p in places[fault.coder][:3]]
        text += f", rows from {', '.join(spots)}"
    elif fault.rows:
        text += f", rows {', '.join(map(str, fault.rows))} of the batch"
    if len(faults) > 1:
        text += f" (and {len(faults) - 1} more coders)"
    text += "; nothing of this step was saved. "
    if fault.what == "input":
        return text + "The model or its cache gave it; --train.on_nonfinite skip leaves such batches out."
    return text + "A lower --train.lr usually helps; --train.on_nonfinite skip leaves such steps out."
