"""Confidence intervals by resampling contexts.

Percentile bootstrap (Efron 1979): contexts are drawn with replacement, the metric is computed again from the
drawn contexts' sums, and the interval lies between the outer quantiles of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unmix.core.errors import ConfigError

_CELLS = 4_000_000
"""Resampling weights held at a time (32 MB)."""

Finish = Callable[[Tensor], Mapping[str, Tensor]]
"""Turns sums [..., columns] into named metrics [...]."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its interval. `None`: undefined (0/0), or no interval can be formed."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """`{"value", "low", "high"}`, fit for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap(
    table: Tensor, finish: Finish, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> dict[str, Estimate]:
    """Metrics of `table` [contexts, columns] with percentile intervals over contexts.

    The same seed gives the same resamples for every table of as many contexts, so that metrics of one
    evaluation are resampled together. One context, or a metric undefined in some resample, has no interval.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ConfigError(f"need resamples >= 1 and 0 < level < 1, found {resamples} and {level}")
    point = finish(table.sum(0))
    n = len(table)
    if n < 2:
        return {name: Estimate(finite_or_none(value)) for name, value in point.items()}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Tensor]] = {name: [] for name in point}
    step = max(1, _CELLS // n)
    for start in range(0, resamples, step):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        for name, values in finish(torch.from_numpy(weights).to(torch.float64) @ table).items():
            drawn[name].append(values)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return {name: _estimate(point[name], torch.cat(drawn[name]), tails) for name in point}


def _estimate(point: Tensor, drawn: Tensor, tails: Tensor) -> Estimate:
    if not bool(torch.isfinite(drawn).all()):
        return Estimate(finite_or_none(point))
    low, high = torch.quantile(drawn, tails).tolist()
    return Estimate(finite_or_none(point), low, high)


def finite_or_none(value: Tensor) -> float | None:
    """A number, or `None` where the ratio is undefined."""
    number = float(value)
    return number if np.isfinite(number) else None
