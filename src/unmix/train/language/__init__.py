"""Small language models of one's own: text in, a Hugging Face folder out (`unmix lm-train`).

Names load on first use, so that importing this room does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.train.language.config import LanguageConfig, load_language_config
    from unmix.train.language.walk import LanguageResult, train_language

__all__ = ["LanguageConfig", "LanguageResult", "load_language_config", "train_language"]

_exports = lazy_exports(
    {
        "LanguageConfig": "unmix.train.language.config",
        "load_language_config": "unmix.train.language.config",
        "LanguageResult": "unmix.train.language.walk",
        "train_language": "unmix.train.language.walk",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
