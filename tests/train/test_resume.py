"""Kill the process anywhere, run the same command again: the result is the same, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unmix.core.errors import CorruptError, MachineError, ResumeError
from unmix.train import trainer as trainer_module
from unmix.train.metrics_log import MetricsLog

from .toys import make_trainer

MOMENTS = [
    "step@3", "step@10", "step@14", "step@29", "saving@1", "saving@3", "manifest@2", "exchange@1", "unexchanged@2",
    "gap@5", "line", "step@9:saving@1:step@16",
]  # fmt: skip
CASES = [f"topk:{moments}" for moments in MOMENTS] + [
    "batchtopk:step@12", "jumprelu:step@12", "relu:exchange@1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """One folder a case, and one a kind that was never interrupted."""
    folder = tmp_path_factory.mktemp("killed")
    straight = ["topk:", "batchtopk:", "jumprelu:", "relu:"]
    command = [sys.executable, "-m", "train.killed", str(folder), *(case.rstrip(":") for case in straight), *CASES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")])}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_bit_identical(trained: Path, case: str) -> None:
    """Weights, Adam's moments, firing counts, threshold, and the metrics line by line."""
    straight, resumed = trained / case.split(":")[0], trained / case
    for name in ("final/state.safetensors", "final/checkpoint.json", "metrics.jsonl"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 10
    if not case.startswith(("relu", "jumprelu")):
        assert any(record["dead"] and record["loss/auxk"] for record in records), "no latent died: AuxK went untested"
    leftovers = [path.name for path in resumed.iterdir() if path.name.startswith(".checkpoint")]
    assert leftovers == []


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    """Another config or other data has another key."""
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.checkpoint()
    make_trainer(tmp_path)
    message = r"checkpoint: was made by another training config or data \(key key, now other\); choose another run"
    with pytest.raises(ResumeError, match=message):
        make_trainer(tmp_path, key="other")


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    """Never trained on from, never silently started over."""
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.checkpoint()
    path = tmp_path / "checkpoint" / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-5])
    with pytest.raises(CorruptError):
        make_trainer(tmp_path)


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says which file could not be written."""
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.checkpoint()

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.fsync", full)
    trainer.step()
    with pytest.raises(MachineError, match=r"checkpoint.*: the disk is full$"):
        trainer.checkpoint()
    monkeypatch.undo()
    assert make_trainer(tmp_path).state.step == 1


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
    monkeypatch.setattr(
        trainer_module, "save_checkpoint", lambda *given: steps.extend(part[-1].step for part in given[-1].values())
    )
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
