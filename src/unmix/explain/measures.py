"""Figures of agreement between what is true and what is predicted; every item may carry a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Real


@dataclass(frozen=True)
class Confusion:
    """(Weighted) counts. A ratio is None where its denominator is 0."""

    hits: float
    false: float
    missed: float
    quiet: float

    @property
    def precision(self) -> float | None:
        """hits / predicted."""
        return _ratio(self.hits, self.hits + self.false)

    @property
    def recall(self) -> float | None:
        """hits / true (TPR)."""
        return _ratio(self.hits, self.hits + self.missed)

    @property
    def specificity(self) -> float | None:
        """quiet / silent (TNR)."""
        return _ratio(self.quiet, self.quiet + self.false)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; 0 where something is true and nothing was hit."""
        return _ratio(2 * self.hits, 2 * self.hits + self.false + self.missed)

    @property
    def accuracy(self) -> float | None:
        """Right answers / all."""
        return _ratio(self.hits + self.quiet, self.hits + self.false + self.missed + self.quiet)

    @property
    def balanced_accuracy(self) -> float | None:
        """(TPR + TNR) / 2: one half for a judge who always says the same."""
        if self.recall is None or self.specificity is None:
            return None
        return (self.recall + self.specificity) / 2


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def confusion(
    true: Bool[np.ndarray, " n"], predicted: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None
) -> Confusion:
    """Count (or weigh) the four cases."""
    w = np.ones(len(true)) if weights is None else weights.astype(np.float64)
    both = float(w[true & predicted].sum())
    false, missed = float(w[~true & predicted].sum()), float(w[true & ~predicted].sum())
    return Confusion(both, false, missed, float(w[~true & ~predicted].sum()))


def pearson(
    x: Real[np.ndarray, " n"], y: Real[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None
) -> float | None:
    """Weighted Pearson correlation in float64; None where either side does not vary."""
    w = np.ones(len(x)) if weights is None else weights.astype(np.float64)
    if not len(x) or w.sum() <= 0:
        return None
    a, b = x.astype(np.float64), y.astype(np.float64)
    a, b = a - np.average(a, weights=w), b - np.average(b, weights=w)
    scale = float(np.sqrt(np.sum(w * a * a) * np.sum(w * b * b)))
    return float(np.sum(w * a * b) / scale) if scale > 0 else None
