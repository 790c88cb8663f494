"""One coder's side of a step: clipping, counting what fired, its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.train.config import OptimConfig
from unmix.train.learner import Learner, fired_latents
from unmix.train.source import TensorSource
from unmix.train.trainer import make_terms

from .toys import make_trainer, planted


def with_gradients(folder: Path, **optim: Any) -> tuple[Learner, dict[str, Tensor]]:
    """A learner after its first backward pass, and copies of its gradients."""
    learner = make_trainer(folder, unit_norm=False, **optim).learner
    x = planted(32, 8, 12, 2)[0]
    learner.loss(learner.forward(x, x))[0].backward()
    return learner, {name: p.grad.clone() for name, p in learner.coder.named_parameters() if p.grad is not None}


def norm_of(grads: dict[str, Tensor]) -> float:
    """Of all together."""
    return float(torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt())


@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path: Path, share: float) -> None:
    """Scaled together where they are longer; where not, left as they are, to the bit."""
    norm = norm_of(with_gradients(tmp_path / "first")[1])
    learner, before = with_gradients(tmp_path / "second", clip=share * norm)
    learner.clip()
    after = {name: p.grad for name, p in learner.coder.named_parameters() if p.grad is not None}
    assert after.keys() == before.keys()
    for name, grad in after.items():
        torch.testing.assert_close(grad, before[name] * min(1.0, share), rtol=1e-4, atol=1e-7)
        assert share < 2 or torch.equal(grad, before[name])


def test_no_clipping_at_zero(tmp_path: Path) -> None:
    """`clip: 0` leaves any gradient alone."""
    learner, before = with_gradients(tmp_path, clip=0.0)
    for p in learner.coder.parameters():
        if p.grad is not None:
            p.grad *= 1000
    learner.clip()
    found = {name: p.grad for name, p in learner.coder.named_parameters() if p.grad is not None}
    assert all(torch.equal(found[name], 1000 * before[name]) for name in before)


@pytest.mark.parametrize("values", [[1.0, 2.0, -3.0], [1.0, 0.0, -3.0], [0.0, 0.0, 0.0]])
def test_what_fired_has_a_value_other_than_zero(values: list[float]) -> None:
    """Explicit zeros are in the codes and did not fire; negative values did."""
    codes = Codes(torch.tensor([4, 1, 4], dtype=torch.int32), torch.tensor(values), torch.tensor([0, 1, 3]), 6, (2,))
    dense = codes.dense() != 0
    assert torch.equal(fired_latents(codes), dense.any(0))


def test_l0_counts_what_fired(tmp_path: Path) -> None:
    """The mean number of values other than zero a row, and the steps since each latent's last."""
    trainer = make_trainer(tmp_path)
    x = planted(32, 8, 12, 2)[0]
    learner = trainer.learner
    batch = learner.forward(x, x)
    learner.loss(batch)[0].backward()
    counts = batch.codes.dense().ne(0)
    metrics = learner.apply(batch, 1.0, {})
    assert metrics.l0 == float(counts.sum(-1).double().mean())
    assert torch.equal(learner.state.tokens_since_fired, torch.where(counts.any(0), 0, 32))


def fresh(kind: str, k: int = 16) -> tuple[Learner, Tensor]:
    """A learner of 64 latents over 300 Gaussian rows of 16, before its first step."""
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    rule = {"kind": kind} if kind == "jumprelu" else {"kind": kind, "k": k}
    config = CoderConfig(d_in=16, n_latents=64, activation=rule)  # pyright: ignore[reportArgumentType]
    optim = OptimConfig(init_rows=300, tokens=960, batch=32)
    return Learner.fresh(config, TensorSource(x), optim, make_terms(config, optim), 30), x


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "groupmax"])
def test_first_codes_have_the_length_that_fits_best(kind: str) -> None:
    """No factor on them would bring the reconstruction nearer; without it many random rows overshoot."""
    learner, x = fresh(kind)
    with torch.no_grad():
        step = learner.forward(x, x)
    y, target = step.reconstruction - learner.coder.b_dec.detach(), step.target - learner.coder.b_dec.detach()
    assert float((y * (target - y)).sum() / y.square().sum()) == pytest.approx(0, abs=2e-3)
    assert float((target - y).square().sum(-1).mean()) < learner.state.variance
    W_enc, drawn = learner.coder.W_enc.detach(), SparseCoder(learner.coder.config, seed=0).W_enc.detach()
    factor = float(W_enc.norm() / drawn.norm())
    assert factor < 0.8
    torch.testing.assert_close(W_enc, drawn * factor)


def test_rows_that_thresholds_look_at_keep_their_length() -> None:
    """A threshold is in the units of pre-activations."""
    learner, _ = fresh("jumprelu")
    assert torch.equal(learner.coder.W_enc, SparseCoder(learner.coder.config, seed=0).W_enc)
