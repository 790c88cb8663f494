"""The loop: what a step does, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unmix.coder.config import CoderConfig
from unmix.core.errors import ConfigError, NonFiniteError
from unmix.train.config import OptimConfig
from unmix.train.learner import project_decoder_gradient
from unmix.train.source import TensorSource
from unmix.train.trainer import Trainer

from .toys import ACTIVATIONS, coder_config, make_trainer, planted


def test_a_planted_dictionary_is_found_again(tmp_path: Path) -> None:
    """48 atoms in 32 dimensions, three a row: every one has a latent that points its way."""
    x, dictionary = planted(4000, 32, 48, 3)
    config = CoderConfig(d_in=32, n_latents=48, activation=ACTIVATIONS["topk"])  # pyright: ignore[reportArgumentType]
    optim = OptimConfig(tokens=80_000, batch=128, lr=8e-3, dead_after=8_000, init_rows=2000)
    coder = Trainer(config, TensorSource(x), optim, tmp_path, "key").run()
    found = (coder.dictionary @ dictionary.T).max(0).values
    assert float(found.mean()) > 0.9
    assert not coder.training


@pytest.mark.parametrize(
    ("kind", "optim"),
    [("topk", {}), ("batchtopk", {}), ("relu", {"sparsity": 0.01}), ("jumprelu", {"sparsity": 0.01})],
)
def test_every_activation_learns(tmp_path: Path, kind: str, optim: dict[str, Any]) -> None:
    """The loss falls; the log holds each term."""
    trainer = make_trainer(tmp_path, kind, tokens=4000, log_every=5, **optim)
    start = trainer.coder.extra().get("threshold", torch.zeros(0)).clone()
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [*range(5, 126, 5)]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert {"step", "loss", "l0", "fvu", "dead", "lr", "loss/mse", "loss/auxk"} <= lines[0].keys()
    if kind in ("topk", "batchtopk"):
        assert lines[0]["l0"] <= 3
    else:
        assert lines[-1]["l0"] < lines[0]["l0"]
    if kind == "jumprelu":
        assert bool((trainer.coder.extra()["threshold"] != start).all())


def test_the_optimiser_follows_the_schedule(tmp_path: Path) -> None:
    """Steps 1 to 10 with 40 % warm-up and 30 % decay of a peak of 0.01."""
    trainer = make_trainer(tmp_path, tokens=320, lr=0.01, warmup=0.4, decay=0.3)
    found = []
    for _ in range(10):
        metrics = trainer.step()
        assert trainer.optimiser.param_groups[0]["lr"] == metrics.lr
        found.append(metrics.lr / 0.01)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_decoder_rows_stay_at_norm_one(tmp_path: Path) -> None:
    """After every step; without `unit_norm` they do not."""
    trainer = make_trainer(tmp_path / "a")
    for _ in range(5):
        trainer.step()
        torch.testing.assert_close(trainer.coder.W_dec.norm(dim=-1), torch.ones(16), rtol=0, atol=1e-6)
    free = make_trainer(tmp_path / "b", unit_norm=False)
    for _ in range(5):
        free.step()
    assert (free.coder.W_dec.norm(dim=-1) - 1).abs().max().item() > 1e-3


def test_the_gradient_along_a_decoder_row_is_taken_out(tmp_path: Path) -> None:
    """What is left stands at right angles to the row."""
    coder = make_trainer(tmp_path).coder
    coder.W_dec.grad = torch.randn_like(coder.W_dec)
    before = coder.W_dec.grad.clone()
    project_decoder_gradient(coder)
    along = (before * coder.W_dec).sum(-1, keepdim=True)
    torch.testing.assert_close(coder.W_dec.grad, before - along * coder.W_dec)
    assert (coder.W_dec.grad * coder.W_dec).sum(-1).abs().max().item() < 1e-6


@pytest.mark.parametrize(("clip", "clipped"), [(1e-3, True), (0.0, False)])
def test_gradients_are_clipped_together(
    tmp_path: Path, clip: float, clipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one norm over all parameters; 0 means not at all."""
    trainer = make_trainer(tmp_path, clip=clip)
    norms: list[float] = []

    def measure(*_: Any, **__: Any) -> None:
        grads = [p.grad for p in trainer.coder.parameters() if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    monkeypatch.setattr(trainer.optimiser, "step", measure)
    trainer.step()
    assert norms[0] == pytest.approx(clip, rel=1e-3) if clipped else norms[0] > 1e-2


def test_dead_latents_are_counted_in_tokens(tmp_path: Path) -> None:
    """A latent that did not fire for `dead_after` tokens; it lives again when it fires."""
    trainer = make_trainer(tmp_path, dead_after=96)
    with torch.no_grad():
        trainer.coder.b_enc[5] = -1e6
    dead = [trainer.step().dead for _ in range(5)]
    assert int(trainer.state.tokens_since_fired[5]) == 160
    assert dead[:3] == [0, 0, 0]
    assert dead[3] >= 1
    fired = trainer.state.tokens_since_fired == 0
    assert bool(fired.any())
    with torch.no_grad():
        trainer.coder.b_enc[5] = 1e6
    trainer.step()
    assert int(trainer.state.tokens_since_fired[5]) == 0


def test_explicit_zeros_do_not_count_as_firing(tmp_path: Path) -> None:
    """A top-k code always has k entries; those of value 0 are silent."""
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.coder.b_enc.fill_(-1e6)
    trainer.step()
    assert trainer.state.tokens_since_fired.tolist() == [32] * 16


def test_the_threshold_is_the_running_mean_of_the_smallest_kept_value(tmp_path: Path) -> None:
    """The first batch sets it, later ones move it by 1 %; a batch that keeps nothing leaves it."""
    trainer = make_trainer(tmp_path, "batchtopk")
    threshold = trainer.coder.extra()["threshold"]
    expected: float | None = None
    with torch.no_grad():
        trainer.coder.b_enc.fill_(-1e6)
    trainer.step()
    assert float(threshold) == -1.0
    with torch.no_grad():
        trainer.coder.b_enc.zero_()
    for _ in range(4):
        x, _ = trainer.source.batch(trainer.state.step, 32)
        smallest = float(trainer.coder.encode(x).values.detach().min())
        trainer.step()
        expected = smallest if expected is None else 0.99 * expected + 0.01 * smallest
        assert float(threshold) == pytest.approx(expected, rel=1e-5)
    l0 = trainer.coder.eval().encode(x).l0().double().mean()
    assert 1 < float(l0) < 6


class _Poisoned(TensorSource):
    """Hands out one value that is no number from step 12 on."""

    bad = float("nan")

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As the parent, spoilt."""
        x = super().batch(step, size)[0].clone()
        if step >= 12:
            x[3, 2] = self.bad
        return x, x


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_numbers_that_are_none_stop_the_training(tmp_path: Path, kind: str, bad: float) -> None:
    """At the step that met them; the last checkpoint is the one before, and it is finite."""
    source = _Poisoned(planted(400, 8, 12, 2)[0])
    source.bad = bad
    optim = OptimConfig(batch=32, tokens=960, init_rows=64, checkpoint_every=1)
    trainer = Trainer(coder_config(kind), source, optim, tmp_path, "key")
    with pytest.raises(
        NonFiniteError, match=r"^input: the input is nan at step 13 \(lr 0\.0008\), rows 3 of the batch;"
    ):
        trainer.run()
    facts = json.loads((tmp_path / "checkpoint" / "00000012" / "checkpoint.json").read_text(encoding="utf-8"))
    assert facts["coders"]["input"]["step"] == 12
    assert all(bool(torch.isfinite(p).all()) for p in trainer.coder.parameters())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_overflows_stops_the_training(tmp_path: Path, clip: float) -> None:
    """Though the loss is finite: one step on it would make every weight NaN, and the next checkpoint with them."""
    trainer = make_trainer(tmp_path, clip=clip, auxk=0)
    trainer.step()
    before = trainer.coder.hash()
    trainer.coder.W_enc.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"^input: the gradient's norm is (nan|inf) at step 2"):
        trainer.step()
    assert trainer.coder.hash() == before
    assert trainer.state.step == 1


def test_a_penalty_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    """Top-k codes have no sparsity penalty; asking for one is a mistake, told before the first activation."""
    with pytest.raises(ConfigError, match=r"^sparsity is 0\.1, but topk coders have no penalty: k sets their L0$"):
        make_trainer(tmp_path, sparsity=0.1)


def test_a_skip_and_a_transcoder_learn(tmp_path: Path) -> None:
    """The target of a linear map is met by the skip alone."""
    x, _ = planted(400, 8, 12, 2)
    target = x @ torch.randn(8, 5) + 1.0
    config = coder_config(d_out=5, reads=("a",), writes=("b",), pre_bias="none", skip=True)
    optim = OptimConfig(batch=64, tokens=16_000, init_rows=400, lr=0.05, auxk=0)
    coder = Trainer(config, TensorSource(x, target), optim, tmp_path, "key").run()
    with torch.no_grad():
        error = (coder(x).reconstruction - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(error) < 0.05
    assert bool(coder.W_skip.any())


def test_timings_stay_out_of_the_metrics(tmp_path: Path) -> None:
    """They differ from run to run, so they have a file of their own."""
    make_trainer(tmp_path).run()
    timing = json.loads((tmp_path / "timings.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert timing.keys() == {"step", "tokens_per_second", "seconds"}
    assert timing["seconds"]["coder"] > 0
    assert "tokens_per_second" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
