"""L0, alive and dense fractions, histogram: by hand, invariant, and loud on NaN."""

from __future__ import annotations

import pytest
import torch

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError, NonFiniteError
from unmix.metrics.sparsity import EDGES, Sparsity


def test_by_hand_with_explicit_zeros():
    # Four tokens, five latents; top-2 with a zero kept: L0 is (2 + 1 + 2 + 2) / 4.
    codes = Codes.from_topk(
        torch.tensor([[0, 1], [0, 2], [1, 0], [0, 3]]),
        torch.tensor([[1.0, 2.0], [1.0, 0.0], [3.0, -1.0], [2.0, 2.0]]),
        n_latents=5,
    )
    metric = Sparsity(5)
    metric.update(codes)
    assert metric.counts.tolist() == [4, 2, 0, 1, 0]
    assert metric.result() == {
        "l0": 1.75,
        "alive_fraction": 0.6,
        "dense_fraction_1": 0.6,
        "dense_fraction_10": 0.6,
    }
    assert metric.n_tokens == 4


def test_dense_shares_are_strict():
    # Latent 0 fires on exactly 1 %, latent 1 on 2 %, latent 2 on exactly 10 %, latent 3 on 11 %.
    dense = torch.zeros(100, 4)
    for latent, n in enumerate((1, 2, 10, 11)):
        dense[:n, latent] = 1.0
    metric = Sparsity(4)
    metric.update(Codes.from_dense(dense))
    assert metric.result()["dense_fraction_1"] == 0.75
    assert metric.result()["dense_fraction_10"] == 0.25


def test_histogram_by_hand():
    dense = torch.zeros(1000, 3)
    dense[0, 0] = 1.0  # log10 = -3
    dense[:, 1] = 1.0  # log10 = 0, the last edge
    metric = Sparsity(3)
    metric.update(Codes.from_dense(dense))
    histogram = metric.histogram()
    assert histogram["never"] == 1 and histogram["tokens"] == 1000
    assert sum(histogram["latents"]) == 2
    assert histogram["latents"][-1] == 1
    assert histogram["latents"][EDGES.tolist().index(-3.0)] == 1


def test_batches_and_merge_order_do_not_matter():
    rng = torch.Generator().manual_seed(0)
    dense = (torch.rand(40, 6, generator=rng) > 0.7).float()
    contexts = torch.arange(40) // 8
    whole = Sparsity(6)
    whole.update(Codes.from_dense(dense), contexts)
    halves = [Sparsity(6), Sparsity(6)]
    for i in range(40):
        halves[i % 2].update(Codes.from_dense(dense[i : i + 1]), contexts[i : i + 1])
    for first, second in (halves, halves[::-1]):
        total = Sparsity(6)
        total.merge(first)
        total.merge(second)
        assert total.intervals() == whole.intervals()
        assert total.histogram() == whole.histogram()
    low, value, high = (getattr(whole.intervals()["l0"], k) for k in ("low", "value", "high"))
    assert low < value < high
    assert whole.intervals()["alive_fraction"].low is None


def test_errors():
    metric = Sparsity(3)
    with pytest.raises(ConfigError, match="codes have 2 latents, expected 3"):
        metric.update(Codes.from_dense(torch.ones(1, 2)))
    with pytest.raises(NonFiniteError) as caught:
        metric.update(Codes.from_dense(torch.tensor([[1.0, 0.0, 0.0], [0.0, float("nan"), 0.0]])), torch.tensor([4, 9]))
    assert str(caught.value) == ("sparsity: 1 non-finite values in the code values, first nan at row 1 (context 9)")
    assert Sparsity(3).result() == {} and Sparsity(3).intervals() == {}
