"""Language models: loading, hook names, capture, the splice, interventions.

Names load on first use, so that importing this room does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.lm.bound import BoundModel, BoundOutput
    from unmix.lm.forward import RunOutput
    from unmix.lm.intervene import (
        Ablate,
        Add,
        Clamp,
        Fires,
        Intervention,
        LatentDistribution,
        Multiply,
        Set,
        Steer,
        interventions_from_json,
        interventions_to_json,
        measure_latents,
    )
    from unmix.lm.load import load_model
    from unmix.lm.model import LanguageModel
    from unmix.lm.points import Hook
    from unmix.lm.tokens import policy_mask

__all__ = [
    "Ablate",
    "Add",
    "BoundModel",
    "BoundOutput",
    "Clamp",
    "Fires",
    "Hook",
    "Intervention",
    "LanguageModel",
    "LatentDistribution",
    "Multiply",
    "RunOutput",
    "Set",
    "Steer",
    "interventions_from_json",
    "interventions_to_json",
    "load_model",
    "measure_latents",
    "policy_mask",
]

_exports = lazy_exports(
    {
        "BoundModel": "unmix.lm.bound",
        "BoundOutput": "unmix.lm.bound",
        "RunOutput": "unmix.lm.forward",
        "Ablate": "unmix.lm.intervene",
        "Add": "unmix.lm.intervene",
        "Clamp": "unmix.lm.intervene",
        "Intervention": "unmix.lm.intervene",
        "Multiply": "unmix.lm.intervene",
        "Set": "unmix.lm.intervene",
        "Fires": "unmix.lm.intervene",
        "LatentDistribution": "unmix.lm.intervene",
        "Steer": "unmix.lm.intervene",
        "interventions_from_json": "unmix.lm.intervene",
        "interventions_to_json": "unmix.lm.intervene",
        "measure_latents": "unmix.lm.intervene",
        "load_model": "unmix.lm.load",
        "LanguageModel": "unmix.lm.model",
        "Hook": "unmix.lm.points",
        "policy_mask": "unmix.lm.tokens",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
