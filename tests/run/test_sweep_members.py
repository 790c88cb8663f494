"""A sweep with members whose numbers become none: the others, their figures and the plot are there all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmix.cli import main
from unmix.core.errors import ConfigError
from unmix.run.checking import check_member
from unmix.run.config import RunConfig
from unmix.run.sweep import SweepSpec, plan_sweep

BAD = 1e30
"""A learning rate after whose first step no loss is a number."""


@pytest.fixture
def files(run_tree: dict[str, Any], tmp_path: Path) -> Any:
    """Writes a run file and a sweep file; gives the arguments of `unmix train`."""

    def do(over: Any, **train: Any) -> list[str]:
        tree = {**run_tree, "data": {**run_tree["data"], "tokens": 30_000}, "evaluate": {"tokens": 512}}
        tree["train"] = {"tokens": 4000, "batch": 500, "init_rows": 500, "log_every": 2, **train}
        for name, content in (("r.yaml", tree), ("sweep.yaml", {"over": over, "evaluate": True})):
            (tmp_path / name).write_text(yaml.safe_dump(content), encoding="utf-8")
        sweep = ["--sweep", str(tmp_path / "sweep.yaml")]
        return ["train", str(tmp_path / "r.yaml"), *sweep, "--out", str(tmp_path / "out"), "--quiet"]

    return do


def members(out: Path) -> dict[str, Any]:
    """Rows of `sweep.json` by name."""
    return {row["member"]: row for row in json.loads((out / "sweep.json").read_text(encoding="utf-8"))["members"]}


def test_one_bad_member_costs_that_member(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told in the table, in sweep.json and can be looked at; the others are trained, evaluated and plotted."""
    arguments, out = files({"coder.k": [2, 4], "train.lr": [1e-3, BAD]}), tmp_path / "out"
    assert main(arguments) == 0
    shown, said = capsys.readouterr()
    found = members(out)
    assert {name for name, row in found.items() if row["lost"]} == {"k2-lr1e-30", "k4-lr1e-30"}
    lost, good = found["k2-lr1e-30"], found["k2-lr0.001"]
    assert (lost["coder"], lost["training"], lost["evaluation"]) == (None, {}, {})
    assert lost["lost"] == "the loss is nan at step 2 (lr 1e+30)"
    assert good["evaluation"]["ce_increase"] is not None
    assert {path.name for path in (out / "coders").iterdir()} == {"k2-lr0.001", "k4-lr0.001"}
    assert "lost     k2-lr1e-30: the loss is nan at step 2 (lr 1e+30)" in shown
    assert "k2-lr1e-30: the loss is nan at step 2" in said
    plot = (out / "pareto.svg").read_text(encoding="utf-8")
    assert "k2-lr0.001" in plot
    assert "k2-lr1e-30" not in plot
    before = (out / "sweep.json").read_bytes()
    assert main(arguments) == 0
    assert (out / "sweep.json").read_bytes() == before
    capsys.readouterr()
    assert main(["train", str(out), "--replay", "k2-lr1e-30"]) == 0
    report = yaml.safe_load(capsys.readouterr().out)
    assert report["step"] == 2
    assert set(report["coders"]) == {"k2-lr1e-30"}


def test_a_run_of_its_own_that_fails_is_told_and_the_next_one_walked(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fields outside coder and training make runs of one member each: nobody is left in the first to go on with."""
    arguments = files([{"seed": [0], "train.lr": [BAD]}, {"seed": [1], "train.lr": [1e-3]}])
    assert main(arguments) == 0
    rows = list(members(tmp_path / "out").values())
    assert "the loss is nan at step 2" in rows[0]["lost"]
    assert rows[1]["lost"] is None
    assert rows[1]["evaluation"]["fvu"] > 0
    assert "lost" in capsys.readouterr().out


def test_no_member_left_is_an_error(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files({"train.lr": [BAD, 2 * BAD]})) == 4
    assert "the loss is nan at step 2" in capsys.readouterr().err


def test_a_run_file_may_ask_for_a_stop(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`train.retire: false` is kept."""
    assert main(files({"train.lr": [1e-3, BAD]}, retire=False)) == 4
    assert "the loss is nan at step 2" in capsys.readouterr().err


def test_members_may_leave_unless_told_otherwise(tmp_path: Path) -> None:
    spec = SweepSpec.model_validate({"over": {"coder.k": [2, 4]}})
    tree = {"model": {"name": "m"}, "coder": {"hook": "layers.1"}}
    (part,) = plan_sweep(spec, tree, tmp_path, "r.yaml")
    assert all(member.train.retire for member in part.config.members().values())
    (part,) = plan_sweep(spec, {**tree, "train": {"retire": False}}, tmp_path, "r.yaml")
    assert not any(member.train.retire for member in part.config.members().values())


def test_where_none_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set is one training of all its parts, and ranks of a mesh would disagree on who is there."""
    coder = {"hook": "layers.0", "write": "layers.1", "n_latents": 64, "k": 4}
    tree: dict[str, Any] = {"model": {"name": "m"}, "coders": {"a": coder, "b": coder}, "train": {"retire": True}}
    config = RunConfig.model_validate({**tree, "coder_set": "both"})
    with pytest.raises(ConfigError, match=r"^a: train\.retire: a coder of a set cannot leave"):
        check_member(config.members()["a"], config)
    config = RunConfig.model_validate(tree)
    check_member(config.members()["a"], config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^a: train\.retire: coders leave the training of one process"):
        check_member(config.members()["a"], config)
