"""Kill the process anywhere, run the same command again: the result is the same, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unmix.core.errors import CorruptError, MachineError, ResumeError
from unmix.train.checkpoint import Checkpoints
from unmix.train.metrics_log import MetricsLog

from .toys import make_trainer

MOMENTS = [
    "step@3", "step@10", "step@14", "step@29", "saving@1", "saving@3", "manifest@2", "renamed@1", "unrenamed@2",
    "forgetting@1", "line", "step@9:saving@1:step@16",
]  # fmt: skip
DICE = random.Random(7)
ANYWHERE = [":".join(f"call@{DICE.randrange(200, 60_000)}" for _ in range(2)) for _ in range(4)]
"""Two deaths each, at the entry of any Python function: building the trainer, a step, a checkpoint, a log line."""
KINDS = ["topk", "batchtopk", "jumprelu", "relu", "group", "signum", "schedule_free", "muon", "ema", "resample"]
CASES = [
    *(f"topk:{moments}" for moments in MOMENTS),
    "batchtopk:step@12", "jumprelu:step@12", "relu:renamed@1",
    *(f"group:{moments}" for moments in [*ANYWHERE, "saving@2", "renamed@2"]),
    "signum:step@12", "schedule_free:step@12", "muon:step@12", "ema:step@12",
    "resample:step@23", "resample:step@26", "resample:step@24:saving@1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """One folder a case, and one a kind that was never interrupted."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "train.killed", str(folder), *KINDS, *CASES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")])}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_bit_identical(trained: Path, case: str) -> None:
    """Weights, Adam's moments, firing counts, threshold, and the metrics line by line."""
    kind = case.split(":")[0]
    straight, resumed = trained / kind, trained / case
    coders = ["one", "two", "three"] if kind == "group" else [kind]
    for name in ("final/state.safetensors", "final/checkpoint.json", *(f"{coder}/metrics.jsonl" for coder in coders)):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name
    log = straight / coders[0] / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 10
    if kind == "resample":
        assert any(record["dead"] for record in records[-3:]), "no latent died: nothing was begun anew"
    if kind in ("topk", "batchtopk", "group"):
        assert any(record["dead"] and record["loss/auxk"] for record in records), "no latent died: AuxK went untested"
    assert sorted(path.name for path in (resumed / "checkpoint").iterdir()) == ["00000021", "00000028"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    """Another config or other data has another key; the fields that changed are named."""
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.checkpoint()
    make_trainer(tmp_path)
    same = r"00000001: was made by another training config or data \(the same fields, .* key key, now other\); choose"
    with pytest.raises(ResumeError, match=same):
        make_trainer(tmp_path, key="other")
    with pytest.raises(
        ResumeError, match=r"data \(input\.train\.lr: 0\.005 → 0\.5; input\.train\.seed: 0 → 1\); choose"
    ):
        make_trainer(tmp_path, key="other", lr=0.5, seed=1)
    assert make_trainer(tmp_path, log_every=1, keep=5).state.step == 1, "operational fields change nothing"


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    """Never trained on from, never silently started over."""
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.checkpoint()
    path = tmp_path / "checkpoint" / "00000001" / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-5])
    with pytest.raises(CorruptError):
        make_trainer(tmp_path)


def test_the_one_before_a_damaged_checkpoint_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warning; the result is that of an uninterrupted training all the same."""
    straight = make_trainer(tmp_path / "a").run().hash()
    trainer = make_trainer(tmp_path / "b", keep=3)
    for _ in range(5):
        trainer.step()
        trainer.checkpoint()
    folder = tmp_path / "b" / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["00000003", "00000004", "00000005"]
    (folder / "00000005" / "state.safetensors").write_bytes(b"x")
    (folder / "00000004" / "manifest.json").unlink()
    monkeypatch.setattr(logging.getLogger("unmix"), "propagate", True)
    with caplog.at_level(logging.WARNING, "unmix"):
        again = make_trainer(tmp_path / "b")
    assert again.state.step == 3
    assert "the checkpoint of step 5 is damaged" in caplog.text
    assert "going on from step 3" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["00000003"]
    assert again.run().hash() == straight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_step_end_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Wherever in the step it comes; the next call goes on from there to the same result."""
    straight = make_trainer(tmp_path / "a").run().hash()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    trainer = make_trainer(tmp_path / "b")
    step = trainer.optimiser.step

    def interrupted() -> None:
        if trainer.at == 10:
            os.kill(os.getpid(), number)
        step()

    monkeypatch.setattr(trainer.optimiser, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)
    again = make_trainer(tmp_path / "b")
    assert again.state.step == 11
    assert again.run().hash() == straight


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says which file could not be written."""
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.checkpoint()

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.fsync", full)
    trainer.step()
    said = r"checkpoint.*: the disk is full; the checkpoint of step 1 is kept, and the same command goes on from there$"
    with pytest.raises(MachineError, match=said), trainer._keeping():
        trainer.checkpoint()
    monkeypatch.undo()
    assert make_trainer(tmp_path).state.step == 1


def test_a_log_that_cannot_be_written_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that turned read-only between two checkpoints."""
    trainer = make_trainer(tmp_path)

    def refused(*_: object) -> None:
        if trainer.at == 9:
            raise MachineError("cannot write metrics.jsonl: the file system is read-only")

    monkeypatch.setattr(MetricsLog, "write", refused)
    with pytest.raises(MachineError, match="read-only; the checkpoint of step 7 is kept, and the same command goes on"):
        trainer.run()


def test_a_checkpoint_holds_all_of_the_state(tmp_path: Path) -> None:
    """What was saved comes back into a new trainer."""
    trainer = make_trainer(tmp_path, "batchtopk")
    for _ in range(3):
        trainer.step()
    trainer.state.tokens_since_fired[:4] = torch.tensor([7, 0, 10**12, 3])
    trainer.checkpoint()
    again = make_trainer(tmp_path, "batchtopk")
    assert again.coder.hash() == trainer.coder.hash()
    assert again.coder.config == trainer.coder.config
    assert again.coder.training
    assert (again.state.step, again.state.variance) == (3, trainer.state.variance)
    assert torch.equal(again.state.tokens_since_fired, trainer.state.tokens_since_fired)
    for one, other in zip(trainer.coder.parameters(), again.coder.parameters(), strict=True):
        state, loaded = trainer.optimiser.state.get(one, {}), again.optimiser.state.get(other, {})
        assert state.keys() == loaded.keys()
        assert all(torch.equal(state[part], loaded[part]) for part in state)
    assert sum(len(state) for state in again.optimiser.state.values()) == 4 * 3


def test_the_first_checkpoint_is_not_written_before_it_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `checkpoint_every` steps, and not after the last."""
    steps: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, parts: steps.append(step))
    make_trainer(tmp_path, checkpoint_every=10).run()
    assert steps == [10, 20]


def test_the_log_forgets_what_lies_after_the_checkpoint(tmp_path: Path) -> None:
    """Whole lines up to its step stay as they are, byte for byte."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) for step in (3, 6, 9)]
    path.write_text("\n".join(lines) + '\n{"step": 12, "lo', encoding="utf-8")
    log = MetricsLog(path, 6)
    assert path.read_text(encoding="utf-8") == "\n".join(lines[:2]) + "\n"
    log.write({"step": 9, "loss": 1.0})
    MetricsLog(path, 9)
    assert path.read_text(encoding="utf-8").splitlines()[2] == '{"step": 9, "loss": 1.0}'
    with pytest.raises(ValueError, match="Out of range float"):
        log.write({"step": 10, "loss": float("nan")})
    MetricsLog(path, 0)
    assert path.read_text(encoding="utf-8") == ""
