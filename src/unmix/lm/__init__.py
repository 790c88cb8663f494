"""Language models: loading, hook names, capture, the splice, interventions.

Names load on first use, so that importing this room does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.lm.bound import BoundModel, BoundOutput
    from unmix.lm.forward import RunOutput
    from unmix.lm.intervene import Ablate, Add, Clamp, Intervention, Multiply, Set
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
    "Hook",
    "Intervention",
    "LanguageModel",
    "Multiply",
    "RunOutput",
    "Set",
    "load_model",
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
        "load_model": "unmix.lm.load",
        "LanguageModel": "unmix.lm.model",
        "Hook": "unmix.lm.points",
        "policy_mask": "unmix.lm.tokens",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
