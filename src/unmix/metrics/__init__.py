"""Streaming metrics in float64, and the small HTML renderer of windows.

Every accumulator has `update(...)`, `merge(other)`, `result() -> {name: value}` and
`intervals(seed=…) -> {name: Estimate}`. Names load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.metrics.intervals import Estimate
    from unmix.metrics.language import Language, TokenLosses, logits_rows, predictions, token_losses
    from unmix.metrics.reconstruction import Reconstruction
    from unmix.metrics.sparsity import Sparsity

__all__ = [
    "Estimate",
    "Language",
    "Reconstruction",
    "Sparsity",
    "TokenLosses",
    "logits_rows",
    "predictions",
    "token_losses",
]

_exports = lazy_exports(
    {
        "Estimate": "unmix.metrics.intervals",
        "Language": "unmix.metrics.language",
        "TokenLosses": "unmix.metrics.language",
        "logits_rows": "unmix.metrics.language",
        "predictions": "unmix.metrics.language",
        "token_losses": "unmix.metrics.language",
        "Reconstruction": "unmix.metrics.reconstruction",
        "Sparsity": "unmix.metrics.sparsity",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
