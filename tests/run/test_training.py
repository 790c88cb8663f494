"""The train stage: guard rails, changed configs, trackers and held-out figures, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unmix.cli import main
from unmix.train.store import CachedStore
from unmix.train.trainer import GroupTrainer


@pytest.fixture
def small(run_tree: dict[str, Any], tmp_path: Path) -> list[str]:
    """Words of `unmix train` that take a second."""
    tree = {**run_tree, "data": {**run_tree["data"], "tokens": 20_000}}
    tree["train"] = {"tokens": 6000, "batch": 500, "init_rows": 500, "log_every": 1, "checkpoint_every": 4}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return ["train", str(path), "--out", str(tmp_path / "out")]


def poison(monkeypatch: pytest.MonkeyPatch, *chunks: int) -> None:
    """One activation of these chunks is no number."""
    inner = CachedStore.chunk

    def spoilt(self: CachedStore, i: int) -> dict[str, torch.Tensor]:
        found = {hook: tensor.clone() for hook, tensor in inner(self, i).items()}
        if i in chunks:
            for tensor in found.values():
                tensor[5, 9, 3] = float("nan")
        return found

    monkeypatch.setattr(CachedStore, "chunk", spoilt)


def test_a_bad_batch_is_named_and_replayed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 4, the context, and a command that shows the step; left out where that is asked for."""
    assert main([*small, "--until", "activations"]) == 0
    poison(monkeypatch, 1)
    capsys.readouterr()
    code = main([*small, "--quiet", "--train.init_rows", "30"])
    err = capsys.readouterr().err
    out = tmp_path / "out"
    assert code == 4, err
    note = json.loads((out / "training" / "replay.json").read_text(encoding="utf-8"))
    place = note["faults"][0]["places"][0]
    assert place["position"] == 9
    assert f"rows from context {place['context']} position 9" in err
    assert f"To look at it: unmix train {out} --replay last" in err
    assert main(["train", str(out), "--replay", "last"]) == 0
    report = yaml.safe_load(capsys.readouterr().out)
    assert report["step"] == note["step"]
    assert report["coders"]["layers.1"]["places"] == [place]
    assert not (out / "coders").exists()
    assert main(["train", str(out), "--replay", "layers.2"]) == 2
    assert "no coder 'layers.2'. Did you mean 'layers.1'" in capsys.readouterr().err
    assert main([*small, "--quiet", "--train.init_rows", "30", "--on-nonfinite", "skip"]) == 0
    lines = (out / "training" / "layers.1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["skipped"] >= 1


def test_nothing_to_replay(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, "--replay", "last"]) == 2
    assert "out: no such run folder" in capsys.readouterr().err


def test_a_changed_field_is_named_when_a_stopped_training_goes_on(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C, then another learning rate: refused with the field. The old config goes on, or the new begins anew."""
    inner = GroupTrainer.group_step

    def stopped(self: GroupTrainer) -> Any:
        if self.at == 6:
            raise KeyboardInterrupt
        return inner(self)

    began: list[int] = []

    def stopped_late(self: GroupTrainer) -> Any:
        began.append(self.at)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "group_step", stopped)
        assert main(small) == 130
    capsys.readouterr()
    assert main([*small, "--train.lr", "0.01"]) == 2
    err = capsys.readouterr().err
    assert "layers.1.train.lr: 0.0008 → 0.01" in err
    assert "or say --redo train to begin anew" in err
    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "group_step", stopped_late)
        assert main(small) == 130
    assert began == [4]
    assert main([*small, "--train.lr", "0.01", "--redo", "train"]) == 0
    assert not (tmp_path / "out" / "training" / "checkpoint").exists()


def test_tracked_and_measured_on_held_out_rows(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the role `score` are never trained on; their figures lie beside the others and go to the tracker."""
    sent: list[dict[str, float]] = []
    names: list[str] = []

    class Tracker:
        def log(self, step: int, figures: dict[str, float]) -> None:
            sent.append({"step": step, **figures})

        def upload(self, name: str, folder: Path) -> None:
            names.append(f"{name} {(folder / 'manifest.json').is_file()}")

        def finish(self) -> None:
            names.append("finished")

    from unmix.run import checking, training

    monkeypatch.setattr(checking, "check_trackers", lambda asked, tracking: None)
    monkeypatch.setattr(training, "start_trackers", lambda asked, session: [Tracker() for _ in asked])
    flags = ["--train.trackers", "[wandb]", "--train.tracking.upload", "true", "--train.held_out", "300"]
    assert main([*small, *flags, "--train.held_out_every", "3"]) == 0
    lines = (tmp_path / "out" / "training" / "layers.1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    measured = [record["step"] for record in records if "held_out/fvu" in record]
    assert measured == [3, 6, 9, 12]
    assert records[-1]["held_out/fvu"] < records[2]["held_out/fvu"]
    assert records[-1]["held_out/l0"] <= 8
    assert any("held_out/fvu" in one for one in sent)
    assert names == ["layers.1 True", "finished"]
