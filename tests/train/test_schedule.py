"""Learning rate and number of steps in closed form."""

from __future__ import annotations

import pytest

from unmix.core.config import build
from unmix.core.errors import ConfigError, DataError
from unmix.train.config import OptimConfig
from unmix.train.schedule import lr_factor
from unmix.train.trainer import total_steps


def test_the_rate_rises_stays_and_falls() -> None:
    """10 steps, 40 % warm-up, 30 % decay."""
    factors = [lr_factor(step, 10, 0.4, 0.3) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0.05, 0.3), (0, 1), (1, 0), (0.5, 0.5)])
def test_no_step_is_wasted(steps: int, warmup: float, decay: float) -> None:
    """Every factor lies in (0, 1]; without warm-up and decay it is 1."""
    factors = [lr_factor(step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    if not (warmup or decay):
        assert factors == [1.0] * steps


@pytest.mark.parametrize(
    ("fields", "rows", "steps"),
    [
        ({"epochs": 3, "batch": 100}, 1000, 30), ({"epochs": 0.5, "batch": 100}, 1050, 5),
        ({"tokens": "1k", "batch": 100}, 250, 10), ({"tokens": 50, "batch": 100}, 250, 1),
    ],
)  # fmt: skip
def test_total_steps(fields: dict[str, object], rows: int, steps: int) -> None:
    """From epochs, or from tokens, which override them."""
    assert total_steps(build(OptimConfig, fields), rows) == steps


def test_less_than_a_batch_of_rows_is_too_little() -> None:
    """Both numbers are named."""
    with pytest.raises(DataError, match=r"^99 training rows are fewer than one batch of 100: take more text$"):
        total_steps(OptimConfig(batch=100), 99)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": 0.8, "decay": 0.3}, r"^config: warmup \+ decay is 1\.1, at most 1$"),
        ({"batch": 0}, r"batch: Input should be greater than 0 \(found 0\)"),
        ({"tokens": "-5"}, r"tokens: Input should be greater than 0"),
        ({"lr": 0}, r"lr: Input should be greater than 0"),
        ({"dead_afer": 1}, r"unknown field 'dead_afer'\. Did you mean 'dead_after'"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=message):
        build(OptimConfig, fields)
