"""How good a coder is: reconstruction, sparsity, and what its reconstruction does to the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.evaluate.coder_sets import evaluate_set
    from unmix.evaluate.evaluation import Evaluation
    from unmix.evaluate.local import evaluate_activations
    from unmix.evaluate.splicing import evaluate

__all__ = ["Evaluation", "evaluate", "evaluate_activations", "evaluate_set"]

_exports = lazy_exports(
    {
        "Evaluation": "unmix.evaluate.evaluation",
        "evaluate": "unmix.evaluate.splicing",
        "evaluate_activations": "unmix.evaluate.local",
        "evaluate_set": "unmix.evaluate.coder_sets",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
