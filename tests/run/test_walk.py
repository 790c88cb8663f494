"""The walker: what is done is skipped, what changed is redone, what is precious is not overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unmix.core.errors import ConfigError, ResumeError
from unmix.run.config import RunConfig
from unmix.run.context import RunContext
from unmix.run.summary import stage_table
from unmix.run.walk import Stage, forget, stage_keys, stamp_of, walk


class Recorder:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: str | None = None

    def stages(self) -> list[Stage]:
        def work(name: str) -> Any:
            def do(context: RunContext) -> None:
                self.calls.append(name)
                if self.fail == name:
                    raise KeyboardInterrupt

            return do

        return [
            Stage("tokens", work("tokens"), lambda c: [c.data], precious=True),
            Stage("activations", work("activations"), lambda c: [c.coder.hook], ("tokens",), scratch=True),
            Stage("train", work("train"), lambda c: [c.train], ("activations",), precious=True),
            Stage("report", work("report"), lambda c: [c.report], ("train",)),
        ]


def config(tmp_path: Path, **fields: Any) -> RunConfig:
    tree = {"model": {"name": "m"}, "coder": {"hook": "layers.1"}, "out": str(tmp_path / "run"), **fields}
    return RunConfig.model_validate(tree)


def test_done_stages_are_skipped(tmp_path: Path) -> None:
    r = Recorder()
    walk(config(tmp_path), r.stages())
    assert r.calls == ["tokens", "activations", "train", "report"]
    _, second = walk(config(tmp_path), r.stages())
    assert r.calls == ["tokens", "activations", "train", "report"]
    assert second.skipped == ["tokens", "activations", "train", "report"]
    assert second.seconds == {}


def test_an_interrupted_stage_is_done_again_and_earlier_ones_are_not(tmp_path: Path) -> None:
    r = Recorder()
    r.fail = "train"
    with pytest.raises(KeyboardInterrupt):
        walk(config(tmp_path), r.stages())
    r.fail = None
    walk(config(tmp_path), r.stages())
    assert r.calls == ["tokens", "activations", "train", "train", "report"]


def test_a_changed_late_stage_is_redone_alone(tmp_path: Path) -> None:
    r = Recorder()
    walk(config(tmp_path), r.stages())
    walk(config(tmp_path, report={"windows": 5}), r.stages())
    assert r.calls[4:] == ["report"]


def test_operational_fields_redo_nothing(tmp_path: Path) -> None:
    r = Recorder()
    walk(config(tmp_path), r.stages())
    walk(config(tmp_path, train={"checkpoint_every": 7}), r.stages())
    assert len(r.calls) == 4


def test_a_precious_stage_is_not_overwritten(tmp_path: Path) -> None:
    r = Recorder()
    walk(config(tmp_path), r.stages())
    with pytest.raises(ResumeError, match=r"stage 'train' was made by another config \(train\.lr: 0\.0008 → 0\.01\)"):
        walk(config(tmp_path, train={"lr": 0.01}), r.stages())
    assert len(r.calls) == 4
    walk(config(tmp_path, train={"lr": 0.01}), r.stages(), redo=["train"])
    assert r.calls[4:] == ["train", "report"]


def test_scratch_is_not_made_again_for_readers_that_are_done(tmp_path: Path) -> None:
    r = Recorder()
    walk(config(tmp_path), r.stages())
    (tmp_path / "run" / ".stages" / "activations.json").unlink()
    walk(config(tmp_path), r.stages())
    assert len(r.calls) == 4


def test_what_a_stage_took_stays_on_record_when_its_result_goes(tmp_path: Path) -> None:
    """It counts as not done, and is made again where a reader is."""
    r = Recorder()
    _, first = walk(config(tmp_path), r.stages())
    folder = tmp_path / "run"
    seconds = stamp_of(folder, "activations") or {}
    forget(folder, "activations")
    forget(folder, "nothing")
    stamp = stamp_of(folder, "activations") or {}
    assert stamp["key"] is None
    assert stamp["seconds"] == seconds["seconds"]
    _, second = walk(config(tmp_path), r.stages())
    assert second.skipped == [stage.name for stage in r.stages()], "spared: its reader is done"
    shown = list(stage_table(second).columns[1].cells)
    assert all(str(cell).startswith("done before, ") for cell in shown)
    walk(config(tmp_path, train={"lr": 0.01}), r.stages(), redo=["train"])
    assert r.calls[4:] == ["activations", "train", "report"]
    assert first.seconds.keys() == {stage.name for stage in r.stages()}


def test_checks_come_before_every_stage(tmp_path: Path) -> None:
    """And before the run file is written; not where the stage is done."""
    r = Recorder()
    asked: list[str] = []

    def refuse(context: RunContext) -> None:
        asked.append(context.config.train.optimiser)
        if len(asked) == 1:
            raise ConfigError("no")

    stages = [replace(stage, check=refuse if stage.name == "train" else None) for stage in r.stages()]
    with pytest.raises(ConfigError, match="no"):
        walk(config(tmp_path), stages)
    assert r.calls == []
    assert not (tmp_path / "run" / "run.yaml").exists()
    walk(config(tmp_path), stages)
    walk(config(tmp_path, report={"windows": 5}), stages)
    assert len(asked) == 2


def test_until_and_unknown_stage(tmp_path: Path) -> None:
    r = Recorder()
    walk(config(tmp_path), r.stages(), until="activations")
    assert r.calls == ["tokens", "activations"]
    with pytest.raises(ConfigError, match=r"no stage 'trian'\. Did you mean 'train'\?"):
        walk(config(tmp_path), r.stages(), until="trian")


def test_keys_depend_on_what_a_stage_reads(tmp_path: Path) -> None:
    r = Recorder()
    a = stage_keys(r.stages(), config(tmp_path))
    b = stage_keys(r.stages(), config(tmp_path, train={"lr": 0.01}))
    assert a["tokens"] == b["tokens"]
    assert a["activations"] == b["activations"]
    assert a["train"] != b["train"]
    assert a["report"] != b["report"]
