"""Terms of the model that runs through the reconstruction (Braun et al. 2024, arXiv 2405.12241 §3).

All are means over positions that count. Coders that are spliced together share such a term: each is trained on its
own weight times the mean over the coders that have it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.core.errors import ConfigError
from unmix.train.objectives import ModelStep, Step
from unmix.train.objectives.predictions import Predictions, shared
from unmix.train.objectives.specs import CeSpec, DownstreamSpec, KlSpec


class KL:
    """KL(p_original ‖ p_spliced) at the logits, in nats a token."""

    name = "kl"

    def __init__(self, spec: KlSpec, coder: CoderConfig) -> None:
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        model = _model(self, step)
        return shared(_predictions(self, model).loss("kl"), model.sharers.get(self.name, 1))


class CE:
    """Cross-entropy of the next token in the spliced model, in nats."""

    name = "ce"

    def __init__(self, spec: CeSpec, coder: CoderConfig) -> None:
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        model = _model(self, step)
        return shared(_predictions(self, model).loss("ce"), model.sharers.get(self.name, 1))


class Downstream:
    """Mean over hooks of the mean squared difference an element of later activations, as e2e_sae has it.

    In the model's own units: what its residual stream's squared elements are like decides the weight.
    """

    name = "downstream"

    def __init__(self, spec: DownstreamSpec, coder: CoderConfig) -> None:
        """`ConfigError` for no hook, or for one where the coder writes: its error there is mse."""
        if not spec.hooks or len(set(spec.hooks)) != len(spec.hooks):
            raise ConfigError(f"{coder.name}: downstream needs hooks, each once; found {list(spec.hooks)}")
        self.spec = spec

    def __call__(self, step: Step) -> Tensor:
        """Scalar."""
        model = _model(self, step)
        errors = [_error(*model.later[hook]) for hook in self.spec.hooks]
        return shared(torch.stack(errors).mean(), model.sharers.get(self.name, 1))


def _error(original: Tensor, spliced: Tensor) -> Tensor:
    wide = torch.promote_types(spliced.dtype, torch.float32)
    return (spliced.to(wide) - original.to(wide)).square().mean()


def _model(term: Any, step: Step) -> ModelStep:
    if step.model is None:
        raise ConfigError(
            f"{step.coder.name}: the term {term.name} looks at the language model run through the reconstruction, and "
            "this training has rows of activations alone"
        )
    return step.model


def _predictions(term: Any, model: ModelStep) -> Predictions:
    if model.predictions is None:
        raise ConfigError(f"the term {term.name} needs logits, and this step has none")
    return model.predictions
