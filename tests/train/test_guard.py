"""Guard rails: numbers that are none, steps that are left out or taken again, and warnings that are said once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.core.errors import ConfigError, NonFiniteError
from unmix.train.config import OptimConfig
from unmix.train.feeds import RowFeed
from unmix.train.learner import StepMetrics
from unmix.train.replay import replay, saved_step
from unmix.train.source import TensorSource
from unmix.train.trainer import GroupTrainer, Job, Trainer
from unmix.train.watch import Watch, warn_of_outliers

from .toys import coder_config, make_trainer, planted


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, though the command line may have taken the logger over."""
    monkeypatch.setattr(logging.getLogger("unmix"), "propagate", True)
    caplog.set_level(logging.WARNING, "unmix")
    return caplog


class Spoilt(TensorSource):
    """Rows in which some steps hold one value that is no number; knows where its rows come from."""

    def __init__(self, x: Tensor, steps: tuple[int, ...]) -> None:
        super().__init__(x)
        self.steps = steps

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """As the parent, spoilt."""
        x = super().batch(step, size)[0].clone()
        if step in self.steps:
            x[3, 2] = float("nan")
        return x, x

    def places(self, index: int, size: int, rows: Any) -> list[dict[str, int]]:
        """Invented."""
        return [{"row": int(row), "context": 100 * index, "position": int(row)} for row in rows]


def group(folder: Path, steps: tuple[int, ...], **optim: Any) -> GroupTrainer:
    config = OptimConfig(batch=32, tokens=640, init_rows=64, log_every=1, checkpoint_every=4, **optim)
    jobs = {name: Job(coder_config("topk", name=name), config) for name in ("one", "two")}
    return GroupTrainer(jobs, RowFeed(Spoilt(planted(400, 8, 12, 2)[0], steps)), folder, "key")


def test_the_batch_is_named_and_can_be_looked_at_again(tmp_path: Path) -> None:
    """Which step, which contexts; the state before it is kept; nothing was touched."""
    trainer = group(tmp_path, (6,))
    said = (
        r"^one: the input is nan at step 7 \(lr 0\.0008\), rows from context 600 position 3 \(and 1 more coders\); "
        r"nothing of this step was saved\. The model or its cache gave it; .* kept beside .*replay\.json$"
    )
    with pytest.raises(NonFiniteError, match=said):
        trainer.run()
    assert trainer.at == 6
    note = json.loads((tmp_path / "replay.json").read_text(encoding="utf-8"))
    assert note["step"] == 7
    assert note["faults"][1]["places"] == [{"row": 3, "context": 600, "position": 3}]
    again = group(tmp_path / "new", (6,))
    for name, saved in saved_step(tmp_path).items():
        assert saved.state.step == 6
        again.learners[name] = type(again.learners[name]).resumed(
            saved, again.jobs[name].config, again.learners[name].terms, again.steps
        )
        assert again.learners[name].coder.hash() == trainer.learners[name].coder.hash()
    report = replay(again.learners, again.feed, 32, tmp_path)
    assert report["step"] == 7
    one = report["coders"]["one"]
    assert (one["input finite"], one["rows"]) == (False, [3])
    assert one["terms"]["mse"] == "nan"
    assert "are none" in one["gradients"]["b_dec"]


def test_no_step_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no step of this training went wrong"):
        saved_step(tmp_path)


def test_steps_may_be_left_out_and_are_counted(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    """The schedule goes on; a resumed training knows the count; the metrics stay JSON."""
    trainer = group(tmp_path, (3, 8), on_nonfinite="skip")
    trainer.run()
    assert trainer.at == 20
    assert {learner.state.skipped for learner in trainer.learners.values()} == {2}
    records = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert records[3] == {"step": 4, "skipped": 1}
    assert records[-1]["skipped"] == 2
    assert warnings.text.count("the input is nan at step 4") == 2
    assert warnings.text.count("left out") == 4
    resumed = group(tmp_path, (3, 8), on_nonfinite="skip")
    assert resumed.at == 16
    assert resumed.learners["two"].state.skipped == 2


def test_too_many_steps_left_out_stop(tmp_path: Path) -> None:
    trainer = group(tmp_path, (3, 5, 8), on_nonfinite="skip", skip_limit=2)
    with pytest.raises(
        NonFiniteError, match=r"at step 9 .* 2 steps were left out before, as many as skip_limit allows"
    ):
        trainer.run()
    assert trainer.at == 8


def test_one_coder_that_fails_alone_is_left_out_alone(tmp_path: Path) -> None:
    """A gradient of its own that overflows: the other one learns."""
    trainer = group(tmp_path, (), on_nonfinite="skip")
    trainer.learners["two"].coder.W_enc.register_hook(lambda grad: grad * float("inf"))
    before = {name: one.coder.hash() for name, one in trainer.learners.items()}
    assert trainer.group_step().keys() == {"one"}
    assert trainer.learners["one"].coder.hash() != before["one"]
    assert trainer.learners["two"].coder.hash() == before["two"]
    assert trainer.learners["two"].state.step == trainer.at == 1


def test_a_large_sum_is_no_fault(tmp_path: Path) -> None:
    """Finite numbers whose sum overflows pass the quick check's closer look."""
    from unmix.train.guard import bad_rows, finite

    assert finite(torch.full((4, 4), 3e38))
    assert not finite(torch.tensor([[1.0, float("-inf")]]))
    assert bad_rows(torch.zeros(3, 2), torch.tensor([[0.0], [float("nan")], [0.0]])) == [1]


def figures(step: int, **changes: float) -> StepMetrics:
    fields: dict[str, Any] = {"loss": 1.0, "terms": {}, "l0": 3.0, "fvu": 0.5, "dead": 0, "lr": 1e-3, **changes}
    return StepMetrics(step=step, **fields)


def watched(tmp_path: Path, kind: str = "topk", **optim: Any) -> Watch:
    trainer = make_trainer(tmp_path, kind, tokens=6400, **optim)
    return Watch("c", trainer.learner)


@pytest.mark.parametrize(
    ("kind", "optim", "changes", "said"),
    [
        ("topk", {}, {"dead": 9}, "c: 9 of 16 latents are dead at step 0"),
        ("topk", {}, {}, None),
        ("relu", {"sparsity": 0.1}, {"l0": 7.0}, "c: L0 is 7 at step 119, more than half the width of the input"),
        ("relu", {"sparsity": 0.1}, {"l0": 0.2}, "c: L0 is 0.2 at step 119: a smaller --train.sparsity"),
        ("jumprelu", {"sparsity": 0.1, "target_l0": 2}, {"l0": 5.0}, "c: L0 is 5 at step 119, far from the 2 aimed at"),
        ("jumprelu", {"sparsity": 0.1, "target_l0": 2}, {"l0": 3.0}, None),
    ],
)
def test_warnings_that_save_a_run(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, kind: str, optim: dict[str, Any], changes: dict[str, float],
    said: str | None,
) -> None:  # fmt: skip
    """Each once, however long it lasts."""
    watch = watched(tmp_path, kind, **optim)
    warnings.clear()
    for step in range(200):
        watch.see(figures(step, **changes))
    assert len(warnings.messages) == (said is not None)
    assert said is None or said in warnings.text


def test_a_rising_loss_is_told(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    """Where it rises by half over its best stretch; not while a term's weight still grows."""
    watch = watched(tmp_path)
    warnings.clear()
    for step in range(200):
        watch.see(figures(step, loss=1.0 if step < 100 else 1.4))
    assert warnings.messages == []
    for step in range(200, 260):
        watch.see(figures(step, loss=1.6))
    assert [m[:56] for m in warnings.messages] == ["c: the loss rises: 1.6 over the last 20 steps, 1 at best"]


@pytest.mark.parametrize(
    ("kind", "optim", "quiet"),
    [
        ("topk", {"k_start": 12, "k_anneal": 0.6}, 120),
        ("topk", {"objective": [{"term": "mse"}, {"term": "auxk", "warmup": 0.6}]}, 120),
        ("relu", {"sparsity": 0.1, "sparsity_warmup": 0.6}, 120),
        ("relu", {"objective": [{"term": "mse"}, {"term": "l1", "p": 1.0, "p_end": 0.5}]}, 200),
    ],
)
def test_what_moves_by_design_is_not_told(
    tmp_path: Path, warnings: pytest.LogCaptureFixture, kind: str, optim: dict[str, Any], quiet: int
) -> None:
    """A loss that grows tenfold, and an L0 far from k, while k falls or a weight ramps up; told soon after that."""
    watch = watched(tmp_path, kind, **optim)
    warnings.clear()
    for step in range(quiet):
        watch.see(figures(step, loss=1.0 + step / 10, l0=12.0 if "k_start" in optim else 3.0))
    assert warnings.messages == []
    for step in range(quiet, 200):
        watch.see(figures(step, loss=1.0 if step < 160 else 9.0))
    assert ("the loss rises" in warnings.text) == (quiet < 200)


def test_a_loss_that_rises_before_a_late_stage_is_told(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    """The stage's own rise is not."""
    late = [{"term": "mse"}, {"term": "auxk", "start": 0.8}]
    watch = watched(tmp_path, objective=late)
    warnings.clear()
    for step in range(200):
        watch.see(figures(step, loss=1.0 if step < 162 else 5.0))
    assert warnings.messages == []
    again = watched(tmp_path, objective=late)
    for step in range(140):
        again.see(figures(step, loss=1.0 if step < 90 else 5.0))
    assert "c: the loss rises: 3 over" in warnings.text


def test_latents_begun_anew_start_the_comparison_again(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    watch = watched(tmp_path)
    warnings.clear()
    for step in range(100):
        watch.see(figures(step))
    watch.restart()
    for step in range(100, 200):
        watch.see(figures(step, loss=3.0))
    assert warnings.messages == []


def test_rows_that_hold_the_variance_are_told(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    """Once, at the start; well-behaved rows are not."""
    x = torch.randn(2000, 8)
    warn_of_outliers("c", TensorSource(x), 2000)
    assert warnings.messages == []
    x[7] *= 1e4
    warn_of_outliers("c", TensorSource(x), 2000)
    assert "c: 2 of the first 2000 rows hold 100 % of the variance" in warnings.text
    warnings.clear()
    optim = OptimConfig(batch=32, tokens=64, init_rows=2000)
    Trainer(coder_config(), TensorSource(x), optim, tmp_path, "key")
    assert warnings.text.count("of the variance") == 1
