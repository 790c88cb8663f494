"""The bootstrap: coverage on a case with a known sampling distribution, chunking, limits."""

from __future__ import annotations

import pytest
import torch

from unmix.core.errors import ConfigError
from unmix.metrics import intervals
from unmix.metrics.context_sums import ContextSums
from unmix.metrics.intervals import bootstrap


def mean(sums: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": sums[..., 1] / sums[..., 0]}


def table(n: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.stack([torch.ones(n, dtype=torch.float64), values], -1)


def test_width_is_that_of_the_mean():
    # The mean of 400 standard normals has standard error 1/20: the 95 % interval is 2 * 1.96 / 20 wide.
    estimate = bootstrap(table(400), mean, resamples=4000)["mean"]
    assert estimate.low is not None and estimate.high is not None
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / 20, rel=0.1)


def test_chunks_draw_the_same_numbers(monkeypatch):
    whole = bootstrap(table(50), mean)
    monkeypatch.setattr(intervals, "_CELLS", 50 * 7)
    assert bootstrap(table(50), mean)["mean"].value == whole["mean"].value
    assert bootstrap(table(50), mean)["mean"].low == pytest.approx(whole["mean"].low, abs=1e-12)


def test_level_and_limits():
    wide, narrow = (bootstrap(table(100), mean, level=level)["mean"] for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert bootstrap(table(1), mean)["mean"].low is None
    with pytest.raises(ConfigError, match="level"):
        bootstrap(table(4), mean, level=1.0)


def test_a_ratio_undefined_in_a_resample_has_no_interval():
    sums = torch.zeros(3, 2, dtype=torch.float64)
    sums[0] = 1.0
    estimate = bootstrap(sums, mean)["mean"]
    assert estimate.as_dict() == {"value": 1.0, "low": None, "high": None}


def test_sums_by_context():
    sums = ContextSums(["a"])
    sums.add(torch.tensor([7, 2, 7]), torch.tensor([[1.0], [2.0], [4.0]]))
    sums.add(torch.tensor([], dtype=torch.int64), torch.zeros(0, 1))
    sums.add(torch.tensor([9]), torch.tensor([[8.0]]))
    assert sums.ids == [2, 7, 9] and sums.n_contexts == 3
    assert sums.table().tolist() == [[2.0], [5.0], [8.0]]
    assert sums.totals().tolist() == [15.0]
    with pytest.raises(ConfigError, match="cannot merge"):
        sums.merge(ContextSums(["b"]))
