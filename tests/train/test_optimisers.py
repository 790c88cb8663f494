"""Optimisers against their formulas; resuming each to the bit is in test_resume."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unmix.core.errors import ConfigError, MachineError
from unmix.train.config import OptimConfig
from unmix.train.optimisers import OPTIMISERS, finish, make_optimiser
from unmix.train.optimisers.muon import MuonAndAdam

from .toys import make_trainer


class Two(nn.Module):
    """A matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(5, dtype=torch.float64))


def gradients(module: nn.Module, n: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in module.parameters()] for _ in range(n)]


def walk(name: str, rates: list[float], **config: Any) -> tuple[Two, list[torch.Tensor], list[list[torch.Tensor]]]:
    """`(module after the steps, parameters before, gradients)`."""
    module = Two()
    before = [p.detach().clone() for p in module.parameters()]
    given = gradients(module, len(rates))
    optimiser = make_optimiser(module, OptimConfig(optimiser=name, lr=0.1, **config))  # pyright: ignore[reportArgumentType]
    for rate, grads in zip(rates, given, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate
        for p, grad in zip(module.parameters(), grads, strict=True):
            p.grad = grad.clone()
        optimiser.step()
    finish(optimiser)
    return module, before, given


def test_signum_steps_by_the_sign_of_the_momentum() -> None:
    module, before, given = walk("signum", [0.1, 0.2, 0.05], betas=(0.8, 0.9))
    for i, p in enumerate(module.parameters()):
        mean, expected = torch.zeros_like(p), before[i].clone()
        for rate, grads in zip([0.1, 0.2, 0.05], given, strict=True):
            mean = 0.8 * mean + 0.2 * grads[i]
            expected -= rate * mean.sign()
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)


def test_schedule_free_ends_at_the_weighted_mean() -> None:
    """x is the mean of z₁ … z_T with weights γ²; gradients are taken at y, so the next z depends on it through them
    alone: with given gradients z is Adam without momentum."""
    rates = [0.02, 0.1, 0.1, 0.05]
    module, before, given = walk("schedule_free", rates, betas=(0.9, 0.99), unit_norm=False)
    for i, p in enumerate(module.parameters()):
        z, square, visited = before[i].clone(), torch.zeros_like(before[i]), []
        for t, (rate, grads) in enumerate(zip(rates, given, strict=True), 1):
            square = 0.99 * square + 0.01 * grads[i] ** 2
            z = z - rate * grads[i] / ((square / (1 - 0.99**t)).sqrt() + 1e-8)
            visited.append(z)
        weights = torch.tensor(rates, dtype=torch.float64) ** 2
        expected = sum(w * v for w, v in zip(weights / weights.sum(), visited, strict=True))
        torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-12)


def test_schedule_free_trains_between_the_mean_and_the_last_point() -> None:
    """y = (1 − β)·z + β·x after each step."""
    module = Two()
    optimiser = make_optimiser(module, OptimConfig(optimiser="schedule_free", unit_norm=False, betas=(0.7, 0.9)))
    for grads in gradients(module, 3):
        for p, grad in zip(module.parameters(), grads, strict=True):
            p.grad = grad
        optimiser.step()
    y, z = module.W.detach().clone(), optimiser.state[module.W]["z"]
    finish(optimiser)
    torch.testing.assert_close(y, 0.3 * z + 0.7 * module.W, rtol=1e-10, atol=1e-12)


def test_schedule_free_refuses_unit_norm() -> None:
    with pytest.raises(ConfigError, match="schedule_free needs unit_norm: false"):
        make_optimiser(Two(), OptimConfig(optimiser="schedule_free"))
    with pytest.raises(ConfigError, match=r"schedule_free needs betas\[0\] between 0 and 1, found 0"):
        make_optimiser(Two(), OptimConfig(optimiser="schedule_free", unit_norm=False, betas=(0.0, 0.9)))


def test_muon_makes_matrices_orthogonal_and_leaves_vectors_to_adam() -> None:
    """A step of a matrix has nearly equal singular values; a vector's is Adam's."""
    module, before, given = walk("muon", [0.1])
    values = torch.linalg.svdvals(module.W.detach() - before[0])
    assert float(values.max() / values.min()) < 2.0
    plain = nn.Parameter(before[1].clone())
    adam = torch.optim.Adam([plain], lr=0.1)
    plain.grad = given[0][1]
    adam.step()
    torch.testing.assert_close(module.b, plain)


def test_muon_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(MachineError, match=r"optimiser muon needs torch 2\.9 or newer, found"):
        MuonAndAdam(list(Two().parameters()), 0.1, (0.9, 0.999))


def test_adam8bit_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        MachineError, match=r"optimiser adam8bit needs the package 'bitsandbytes': pip install 'unmix\["
    ):
        make_optimiser(Two(), OptimConfig(optimiser="adam8bit"))


def test_numbers_beside_tensors_come_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes counts steps in a plain number and shares its tables: a stand-in of that shape resumes exactly."""

    class Adam8bit(torch.optim.Optimizer):
        table = torch.linspace(-1, 1, 7)

        def __init__(self, params: Any, lr: float, betas: tuple[float, float]) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["qmap1"] = self.table
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] / state["step"])

    library = types.ModuleType("bitsandbytes")
    library.optim = types.SimpleNamespace(Adam8bit=Adam8bit)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    straight = make_trainer(tmp_path / "a", optimiser="adam8bit").run().hash()
    first = make_trainer(tmp_path / "b", optimiser="adam8bit")
    for _ in range(5):
        first.step()
    first.checkpoint()
    again = make_trainer(tmp_path / "b", optimiser="adam8bit")
    assert {state["step"] for state in again.optimiser.state.values()} == {5}
    assert again.run().hash() == straight


@pytest.mark.parametrize(
    ("name", "config"),
    [("adam", {}), ("signum", {"lr": 1e-3}), ("muon", {}), ("schedule_free", {"unit_norm": False, "decay": 0.0})],
)
def test_every_optimiser_learns(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, optimiser=name, tokens=4000, **config)
    first = trainer.step().fvu
    coder = trainer.run()
    x, _ = trainer.source.batch(0, 300)
    with torch.no_grad():
        error = (coder(x).reconstruction - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) < 0.6 * first


def test_names_in_the_config_are_those_of_the_registry() -> None:
    annotation = OptimConfig.model_fields["optimiser"].annotation
    assert set(annotation.__args__) <= set(OPTIMISERS.names())  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
