"""The mean of the weights, and dead latents begun anew: against their formulas."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from unmix.core.errors import ConfigError
from unmix.train.averaging import update_average
from unmix.train.config import OptimConfig
from unmix.train.resampling import SHORT, moments, resample

from .toys import make_trainer


def test_the_coder_ends_with_the_mean_of_its_weights(tmp_path: Path) -> None:
    """Σ βⁿ⁻ⁱ (1 − β) wᵢ / (1 − βⁿ) over the steps; a threshold that learns is averaged, decoder rows have norm 1."""
    trainer = make_trainer(tmp_path, "jumprelu", tokens=320, ema=0.7, sparsity=0.01)
    seen: list[dict[str, torch.Tensor]] = []
    while trainer.at < trainer.steps:
        trainer.step()
        seen.append({name: p.detach().clone().double() for name, p in trainer.coder.named_parameters()})
    coder = trainer.run()
    n = len(seen)
    for name, p in coder.named_parameters():
        mean = sum((0.7 ** (n - 1 - i) * 0.3 * seen[i][name] for i in range(n)), torch.zeros(())) / (1 - 0.7**n)
        if name == "W_dec":
            mean = mean / mean.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(p.detach().double(), mean, rtol=1e-5, atol=1e-6, msg=name)
    assert float((coder.W_enc.detach() - seen[-1]["W_enc"]).abs().max()) > 1e-4


def test_the_mean_does_not_move_the_training(tmp_path: Path) -> None:
    """Step by step the weights are those of a training without."""
    plain, other = make_trainer(tmp_path / "a", "batchtopk"), make_trainer(tmp_path / "b", "batchtopk", ema=0.9)
    for _ in range(6):
        plain.step()
        other.step()
    assert plain.coder.hash() == other.coder.hash()
    assert "threshold" not in other.state.average, "batchtopk's is a running mean already"


def dead_ones(folder: Path, kind: str = "relu", **optim: Any) -> Any:
    """A trainer ten steps on, of which latents 2, 5 and 7 are dead."""
    trainer = make_trainer(folder, kind, **{"dead_after": 10_000, "resample_rows": 400, "sparsity": 0.01, **optim})
    for _ in range(10):
        trainer.step()
    trainer.state.tokens_since_fired[:] = 0
    trainer.state.tokens_since_fired[[2, 5, 7]] = 10_000
    trainer.coder.b_enc.data[5] = 3.0
    return trainer


def test_dead_latents_begin_anew_where_the_coder_is_worst(tmp_path: Path) -> None:
    """Direction, lengths, bias, momenta and count; nothing else moves, and a second call does the same."""
    trainer = dead_ones(tmp_path / "a")
    learner, coder = trainer.learner, trainer.coder
    before = {name: p.detach().clone() for name, p in coder.named_parameters()}
    dead, alive = [2, 5, 7], [i for i in range(16) if i not in (2, 5, 7)]
    assert resample(learner, trainer.source) == 3
    coder.requires_grad_(False)
    x = trainer.source.batch(trainer.at * 32 // 400, 400)[0] * coder.config.input_scale - before["b_dec"]
    directions = torch.nn.functional.normalize(x, dim=-1)
    for i in dead:
        nearest = (directions @ coder.dictionary[i]).max()
        assert float(nearest) == pytest.approx(1, abs=1e-5), "points along a row"
        torch.testing.assert_close(
            coder.W_enc[i] / coder.W_enc[i].norm(), coder.W_dec[i] / coder.W_dec[i].norm(), rtol=1e-4, atol=1e-5
        )
    lengths = before["W_enc"][alive].norm(dim=-1).mean()
    torch.testing.assert_close(coder.W_enc[dead].norm(dim=-1), (SHORT * lengths).expand(3))
    norms = before["W_dec"][alive].norm(dim=-1).mean()  # a relu coder's penalty holds them, so they are not 1
    torch.testing.assert_close(coder.W_dec[dead].norm(dim=-1), norms.expand(3))
    assert coder.b_enc[dead].tolist() == [0.0] * 3
    assert trainer.state.tokens_since_fired.tolist() == [0] * 16
    for name in ("W_enc", "W_dec", "b_enc"):
        state = trainer.optimiser.state[getattr(coder, name)]
        for part in ("exp_avg", "exp_avg_sq"):
            assert not state[part][dead].any()
            assert state[part][alive].any()
        assert torch.equal(getattr(coder, name)[alive], before[name][alive])
    assert torch.equal(coder.b_dec, before["b_dec"])
    again = dead_ones(tmp_path / "b")
    resample(again.learner, again.source)
    assert torch.equal(again.coder.W_dec, coder.W_dec)


def test_places_are_drawn_by_the_square_of_the_loss(tmp_path: Path) -> None:
    """Where one row's loss is far above all others', it is drawn."""
    trainer = dead_ones(tmp_path)
    ids = trainer.source._order.batch(trainer.at * 32 // 400, 400)
    trainer.source.x[int(ids[17])] = torch.tensor([300.0, 0, 0, 0, 0, 0, 0, 0])
    resample(trainer.learner, trainer.source)
    found = trainer.coder.dictionary[[2, 5, 7]]
    assert float(found[:, 0].max()) > 0.99


def test_thresholds_begin_anew_too(tmp_path: Path) -> None:
    trainer = dead_ones(tmp_path, "jumprelu")
    trainer.coder.threshold.data[5] = 9.0
    resample(trainer.learner, trainer.source)
    assert trainer.coder.threshold[5].item() == pytest.approx(0.3)


def test_the_mean_of_new_rows_begins_anew(tmp_path: Path) -> None:
    trainer = dead_ones(tmp_path, ema=0.9)
    resample(trainer.learner, trainer.source)
    mean = trainer.state.average["W_dec"] / (1 - 0.9**trainer.at)
    torch.testing.assert_close(mean[[2, 5, 7]], trainer.coder.W_dec[[2, 5, 7]].detach())
    update_average(trainer.learner)


def test_resampling_happens_at_its_moments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twice in thirty steps; latents that were dead fire again."""
    caplog.set_level(logging.INFO, "unmix")
    sparse: dict[str, Any] = {"sparsity": 5, "sparsity_warmup": 0.0, "lr": 2e-2, "dead_after": 64}
    make_trainer(tmp_path, "relu", resample=(0.8, 0.9), resample_rows=200, **sparse).run()
    said = [m for m in caplog.messages if "begun anew" in m]
    assert [m.rsplit(" ", 1)[1] for m in said] == ["24", "27"], caplog.messages


def test_training_goes_on_from_a_coder_that_is_there(tmp_path: Path) -> None:
    """Its weights and scales; the loss begins where it ended, and a resumed training does not go back to it."""
    first = make_trainer(tmp_path / "a", "jumprelu", sparsity=0.01)
    coder = first.run()
    coder.save(tmp_path / "coder")
    start = {"start_from": str(tmp_path / "coder"), "sparsity": 0.01}
    again = make_trainer(tmp_path / "b", "jumprelu", **start)
    assert again.coder.config.input_scale == coder.config.input_scale
    for name, p in coder.named_parameters():
        assert torch.equal(dict(again.coder.named_parameters())[name], p)
        assert dict(again.coder.named_parameters())[name].requires_grad == p.requires_grad
    assert again.state.variance == pytest.approx(first.state.variance)
    for _ in range(7):
        again.step()
    again.checkpoint()
    resumed = make_trainer(tmp_path / "b", "jumprelu", **start)
    assert resumed.at == 7
    assert resumed.coder.hash() == again.coder.hash() != coder.hash()


def test_a_coder_that_training_cannot_go_on_from(tmp_path: Path) -> None:
    coder = make_trainer(tmp_path / "a", "relu", sparsity=0.01).run()
    coder.save(tmp_path / "coder")
    place = str(tmp_path / "coder")
    with pytest.raises(ConfigError, match=r"input: cannot begin with .*coder: activation is topk here and relu there"):
        make_trainer(tmp_path / "b", "topk", start_from=place)
    with torch.no_grad():
        coder.W_dec.mul_(2)
    coder.save(tmp_path / "coder")
    with pytest.raises(
        ConfigError, match=r"decoder rows have norms of .* holds them at 1; say train\.unit_norm: false"
    ):
        make_trainer(tmp_path / "c", "relu", start_from=place)


def test_moments_are_steps() -> None:
    assert moments(OptimConfig(resample=(0.5, 0.25, 0.001)), 100) == (1, 25, 50)
    assert moments(OptimConfig(), 100) == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample": (0.5, 1.0)}, "resample holds shares of the training, between 0 and 1"),
        ({"ema": 1.0}, "less than 1"),
        ({"ema": 0.9, "optimiser": "schedule_free"}, "schedule_free ends with a mean already"),
        ({"tracking": {"upload": True}}, "artifact of wandb, which is not among the trackers"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**fields)


def test_an_optimiser_that_cannot_forget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.resample forgets what .* schedule_free keeps more than momenta"):
        make_trainer(tmp_path, resample=(0.5,), optimiser="schedule_free", unit_norm=False)
