"""Reconstruction metrics: values known by hand, independence of batching, stability, errors."""

from __future__ import annotations

import pytest
import torch

from unmix.core.errors import ConfigError, NonFiniteError
from unmix.metrics.reconstruction import Reconstruction


def parts(n: int = 60, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng) * 2 + 3
    xhat = x + 0.3 * torch.randn(n, d, generator=rng)
    return x, xhat, torch.arange(n) // 6


def measured(x, xhat, contexts=None, sizes=None, centre=None) -> Reconstruction:
    metric = Reconstruction(centre)
    contexts = torch.zeros(len(x), dtype=torch.int64) if contexts is None else contexts
    sizes = [len(x)] if sizes is None else sizes
    for a, b, c in zip(x.split(sizes), xhat.split(sizes), contexts.split(sizes)):
        metric.update(a, b, c)
    return metric


def test_two_tokens_by_hand():
    # mean (2, 0): sum |x - mean|^2 = 2; e = (1, 0), (0, 0): fvu 1/2. sum |x|^2 = 1 + 9.
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    xhat = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    result = measured(x, xhat, centre=torch.tensor([2.0, 0.0])).result()
    assert result["fvu"] == pytest.approx(0.5)
    assert result["explained_variance"] == pytest.approx(0.5)
    assert result["nmse"] == pytest.approx(0.1)
    assert result["cosine"] == pytest.approx(0.5)  # 0 for the silent one, 1 for the other
    assert result["l2_ratio"] == pytest.approx(0.5)
    assert result["relative_reconstruction_bias"] == pytest.approx(1.0)  # 9 / 9
    assert result["explained_variance_per_token"] == pytest.approx(0.5)  # (1 - 1/1) and 1


def test_bias_and_ratio_of_a_shrunk_reconstruction():
    x, _, _ = parts()
    result = measured(x, x / 2).result()
    assert result["l2_ratio"] == pytest.approx(0.5)
    assert result["relative_reconstruction_bias"] == pytest.approx(0.5)
    assert result["cosine"] == pytest.approx(1.0)
    assert result["nmse"] == pytest.approx(0.25)


def test_the_mean_as_reconstruction_explains_nothing():
    # Would be about 0.7 if the variance were not centred.
    x, _, _ = parts()
    mean = x.double().mean(0).expand_as(x).float()
    assert measured(x, mean).result()["fvu"] == pytest.approx(1.0, abs=1e-6)


def test_prediction_and_target_are_not_swapped():
    x, _, _ = parts()
    result = measured(x, torch.zeros_like(x)).result()
    centred = (x.double() - x.double().mean(0)).square().sum()
    assert result["fvu"] == pytest.approx(float(x.double().square().sum() / centred))
    assert result["nmse"] == pytest.approx(1.0)


def test_batching_and_merge_order_do_not_matter():
    x, xhat, contexts = parts()
    centre = x.double().mean(0)
    whole = measured(x, xhat, contexts, centre=centre)
    for sizes in ([6] * 10, [1, 59], [13, 17, 30]):
        split = measured(x, xhat, contexts, sizes, centre=centre)
        for name, estimate in whole.intervals(seed=3).items():
            other = split.intervals(seed=3)[name]
            assert other.value == pytest.approx(estimate.value, rel=1e-12)
            assert (other.low, other.high) == pytest.approx((estimate.low, estimate.high), rel=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_merge_of_different_shifts(order):
    x, xhat, contexts = parts()
    # The shift is the mean of the first four rows only, so it is not the mean of the piece.
    pieces = [measured(x[i::3], xhat[i::3], contexts[i::3], sizes=[4, 16]) for i in order]
    total = Reconstruction()
    for piece in pieces:
        total.merge(piece)
    whole = measured(x, xhat, contexts).result()
    assert total.result() == pytest.approx(whole, rel=1e-12)
    assert total.n_tokens == len(x)


def test_stable_where_the_mean_dwarfs_the_spread():
    # Uncentred sums in float64 would keep about 1e-16 * 1e16 = nothing of the variance.
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(400, 3, generator=rng, dtype=torch.float64)
    x, xhat = noise + 1e8, noise + 1e8 + 0.1
    expected = float(((x - xhat).square().sum()) / (noise - noise.mean(0)).square().sum())
    assert measured(x, xhat, sizes=[50] * 8).result()["fvu"] == pytest.approx(expected, rel=1e-6)


def test_interval_holds_the_value_and_is_seeded():
    x, xhat, contexts = parts()
    metric = measured(x, xhat, contexts)
    first, again, other = (metric.intervals(seed=s)["fvu"] for s in (0, 0, 1))
    assert first == again and first != other
    assert first.low is not None and first.high is not None
    assert first.low < first.value < first.high


def test_undefined_and_empty():
    x = torch.full((4, 2), 0.1)
    result = measured(x, x).result()
    assert result["fvu"] is None and result["nmse"] == 0.0
    assert Reconstruction().result() == {}
    assert measured(x, x).intervals()["nmse"].low is None  # one context


def test_zero_tokens_have_no_direction():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert measured(x, x).result()["cosine"] == pytest.approx(1.0)
    assert measured(x, x).result()["l2_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_named(value):
    x, xhat, contexts = parts()
    xhat[13, 2] = value
    with pytest.raises(NonFiniteError) as caught:
        measured(x, xhat, contexts)
    assert str(caught.value) == (
        f"reconstruction: 1 non-finite values in the reconstruction, first {value} at row 13, column 2 (context 2)"
    )
    with pytest.raises(NonFiniteError, match=r"values in x, first"):
        measured(xhat, x, contexts)


def test_widths_must_agree():
    metric = Reconstruction()
    metric.update(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"width 4, earlier batches had 3"):
        metric.update(torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(ConfigError, match="given centres"):
        known = Reconstruction(torch.zeros(3))
        known.update(torch.ones(2, 3), torch.ones(2, 3))
        metric.merge(known)
