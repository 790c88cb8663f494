"""Learning-rate schedule: linear warm-up, flat, linear decay to zero. A function of the step alone."""

from __future__ import annotations


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor on the peak rate at `step` (0-based) of `steps`; `warmup` and `decay` are shares of the steps."""
    rise, fall = warmup * steps, decay * steps
    up = (step + 1) / rise if rise and step + 1 < rise else 1.0
    left = steps - step
    down = left / fall if fall and left < fall else 1.0
    return min(up, down)
