"""First weights: training starts where the data is, in the data's own scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unmix.core.errors import ConfigError, NonFiniteError
from unmix.train.config import OptimConfig
from unmix.train.initialise import geometric_median, initialise, scale_of
from unmix.train.source import TensorSource
from unmix.train.spaces import inner_target

from .toys import coder_config

OPTIM = OptimConfig(init_rows=500)


def data(rows: int = 500, d: int = 8, offset: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Gaussian rows around a far centre."""
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)) * 0.1 + offset


def test_the_mean_norm_becomes_the_root_of_the_width() -> None:
    """E‖s‖ = √d, and the output is scaled back."""
    x = data()
    coder, _ = initialise(coder_config(), TensorSource(x), OPTIM)
    s, _ = coder.prepare(x)
    assert float(s.norm(dim=-1).mean()) == pytest.approx(8**0.5, rel=1e-6)
    assert coder.config.input_scale * coder.config.output_scale == pytest.approx(1.0)
    assert scale_of(torch.zeros(3, 4)) > 0


def test_the_loss_is_in_units_of_the_data_s_variance() -> None:
    """A coder that answers with the mean alone has MSE 1."""
    x = data()
    coder, variance = initialise(coder_config(), TensorSource(x), OPTIM)
    s, _ = coder.prepare(x)
    assert variance == pytest.approx(float((s - s.mean(0)).square().sum(-1).mean()), rel=1e-5)


def test_the_decoder_s_bias_starts_at_the_geometric_median() -> None:
    """Which a few outliers do not move."""
    x = data()
    x[:20] += 1000
    coder, _ = initialise(coder_config(pre_bias="own"), TensorSource(x), OPTIM)
    centre = data().mean(0) * coder.config.input_scale
    torch.testing.assert_close(coder.b_dec.detach(), centre, rtol=0.01, atol=0)
    assert torch.equal(coder.b_pre, coder.b_dec)


@pytest.mark.parametrize(
    ("points", "median"),
    [
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.5, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]], [0.0, 0.0]),
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, 3**0.5]], [0.0, 3**-0.5]),
    ],
)
def test_geometric_median(points: list[list[float]], median: list[float]) -> None:
    """A square, a majority, and Fermat's point of a triangle."""
    found = geometric_median(torch.tensor(points), steps=200)
    torch.testing.assert_close(found, torch.tensor(median), rtol=0, atol=1e-3)


def test_a_transcoder_has_two_scales() -> None:
    """Each side by its own norm, the bias in the target's space."""
    x, target = data(d=8), 50 * data(d=6, offset=1.0, seed=1)
    config = coder_config(d_out=6, reads=("a",), writes=("b",), pre_bias="none")
    coder, variance = initialise(config, TensorSource(x, target), OPTIM)
    wanted = inner_target(coder.config, coder.prepare(x)[0], target, {})
    assert float(wanted.norm(dim=-1).mean()) == pytest.approx(6**0.5, rel=1e-6)
    torch.testing.assert_close(coder.b_dec.detach(), geometric_median(wanted), rtol=1e-4, atol=1e-4)
    assert variance == pytest.approx(float((wanted - wanted.mean(0)).square().sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "normalise",
    [
        {"kind": "layer_norm"},
        {"kind": "layer_norm", "eps": 0.1, "eps_back": True},
        {"kind": "layer_norm", "restore": False},
    ],
)
def test_the_inner_target_is_what_finish_turns_into_the_target(normalise: dict[str, Any]) -> None:
    """So that a loss of zero inside is a perfect output."""
    x, target = data(d=8), data(d=8, seed=1)
    config = coder_config(reads=("a",), writes=("b",), pre_bias="none", normalise=normalise, output_scale=0.5)
    coder, _ = initialise(config, TensorSource(x, target), OPTIM)
    assert (coder.config.input_scale, coder.config.output_scale) == (1.0, 0.5)
    s, context = coder.prepare(x)
    wanted = inner_target(coder.config, s, target, context)
    torch.testing.assert_close(coder.finish(wanted, **context), target)


def test_a_constant_input_does_not_spoil_the_target() -> None:
    """Its standard deviation is 0."""
    x, target = data(d=8), data(d=8, seed=1)
    x[3] = 1.0
    config = coder_config(reads=("a",), writes=("b",), pre_bias="none", normalise={"kind": "layer_norm"})
    coder, variance = initialise(config, TensorSource(x, target), OPTIM)
    assert bool(torch.isfinite(coder.b_dec).all())
    assert 0 < variance < float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers(bad: float) -> None:
    """Found before the first step."""
    x = data()
    x[7, 3] = bad
    with pytest.raises(NonFiniteError, match=r"^input: the first activations hold NaN or infinity$"):
        initialise(coder_config(), TensorSource(x), OPTIM)


def test_a_target_that_nobody_would_learn_is_refused() -> None:
    """A coder that writes what it reads learns its input: a target of its own would be ignored."""
    with pytest.raises(ConfigError, match=r"^input: reads and writes 'input', but the target is not the input$"):
        initialise(coder_config(), TensorSource(data(), data(seed=1)), OPTIM)


def test_the_same_seed_gives_the_same_weights() -> None:
    """And another seed others."""
    first, second = (initialise(coder_config(), TensorSource(data()), OPTIM)[0] for _ in range(2))
    other, _ = initialise(coder_config(), TensorSource(data()), OptimConfig(init_rows=500, seed=1))
    assert first.hash() == second.hash() != other.hash()
