"""One of several coders fails: it leaves, the others end as if it had never been there, killed in between or not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import unmix
from unmix.core.errors import ConfigError, NonFiniteError
from unmix.train.config import OptimConfig
from unmix.train.feeds import RowFeed
from unmix.train.replay import saved_step
from unmix.train.retiring import NOTE, may_leave, retired
from unmix.train.source import TensorSource
from unmix.train.trainer import GroupTrainer, Job

from .killed import jobs_of
from .toys import coder_config, planted

MOMENTS = ["step@8", "step@11", "step@12", "saving@2", "renamed@3", "step@10:step@3:step@9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """One folder a moment of death, and of trainings that were never interrupted."""
    folder = tmp_path_factory.mktemp("retired")
    cases = ["group", "retire", *(f"retire:{moments}" for moments in MOMENTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")])}
    command = [sys.executable, "-m", "train.killed", str(folder), *cases]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_others_are_what_they_would_be_without_it(trained: Path) -> None:
    """Bit for bit, weights and metrics; the one that left has no weights at the end, and a reason."""
    for file in ("final/state.safetensors", "one/metrics.jsonl", "two/metrics.jsonl", "three/metrics.jsonl"):
        assert (trained / "retire" / file).read_bytes() == (trained / "group" / file).read_bytes(), file
    note = retired(trained / "retire" / "bad")
    assert note is not None
    assert note["reason"] == "bad: the gradient's norm is inf at step 11 (lr 0.005)"
    lines = (trained / "retire" / "bad" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9]
    assert saved_step(trained / "retire" / "bad")["bad"].state.step == 10


@pytest.mark.parametrize("moments", MOMENTS)
def test_killed_and_resumed_it_leaves_at_the_same_step(trained: Path, moments: str) -> None:
    """Before it left, right after it did, and in the checkpoint that it is missing from."""
    straight, resumed = trained / "retire", trained / f"retire:{moments}"
    names = [f"{name}/metrics.jsonl" for name in ("bad", "one", "two", "three")]
    for file in ("final/state.safetensors", "final/checkpoint.json", f"bad/{NOTE}", *names):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file


def group(folder: Path, **optim: Any) -> GroupTrainer:
    """Two coders, of which `bad` takes steps of a size that no number holds."""
    common: dict[str, Any] = {"batch": 32, "tokens": 640, "init_rows": 64, "retire": True, **optim}
    rates = {"good": 1e-3, "bad": 1e30}
    jobs = {n: Job(coder_config("relu", name=n), OptimConfig(**common, lr=lr)) for n, lr in rates.items()}
    return GroupTrainer(jobs, RowFeed(TensorSource(planted(400, 8, 12, 2)[0])), folder, "key")


def test_who_left_is_told_now_and_on_resuming(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("unmix"), "propagate", True)
    trainer = group(tmp_path, checkpoint_every=10)
    assert list(trainer.run()) == ["good"]
    assert trainer.at == 20
    assert "bad: the loss is nan at step 2 (lr 1e+30): it leaves the training; others that go on: 1" in caplog.text
    caplog.clear()
    again = group(tmp_path, checkpoint_every=10)
    assert (list(again.learners), again.at) == (["good"], 10)
    assert "bad left this training: bad: the loss is nan at step 2" in caplog.text


def test_a_new_training_forgets_who_left(tmp_path: Path) -> None:
    group(tmp_path, checkpoint_every=100).run()
    assert retired(tmp_path / "bad") is not None
    group(tmp_path, checkpoint_every=100)
    assert retired(tmp_path / "bad") is None


@pytest.mark.parametrize("optim", [{"retire": False}, {"splice": "together"}])
def test_elsewhere_one_stops_all(tmp_path: Path, optim: dict[str, Any]) -> None:
    """Unless asked to go on, and where the others read what it writes."""
    with pytest.raises(NonFiniteError, match="bad: the loss is nan at step 2"):
        group(tmp_path, **optim).run()
    assert retired(tmp_path / "bad") is None


def test_steps_are_left_out_first_where_the_config_says_so(tmp_path: Path) -> None:
    trainer = group(tmp_path, on_nonfinite="skip", skip_limit=3)
    assert list(trainer.run()) == ["good"]
    note = retired(tmp_path / "bad")
    assert note is not None
    assert note["step"] == 5


def test_train_on_lets_nobody_go() -> None:
    """It promises a coder for each hook."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"train\.retire: train_on gives every coder that it is asked for"):
        unmix.train_on(module, [torch.zeros(8, 4)], hook="0", train={"retire": True})


def test_the_last_ones_do_not_leave() -> None:
    """A training without coders is none: whoever fails then stops it."""
    config = OptimConfig(retire=True)
    assert may_leave(["a"], {"a": config, "b": config})
    assert not may_leave(["a", "b"], {"a": config, "b": config})
    assert not may_leave(["a"], {"a": config})


def test_the_kind_for_the_kills_fails_late() -> None:
    """So that checkpoints with and without it exist."""
    spec = jobs_of("retire")["bad"].config.objective
    assert spec is not None
    assert spec[1].start * 30 > 7
