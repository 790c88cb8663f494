"""Several coders of one run, and sweeps: one stream of activations for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

import unmix
from unmix.cli import main
from unmix.coder.native import load_native
from unmix.core.errors import ConfigError
from unmix.run.config import RunConfig, load_run
from unmix.run.sweep import Range, SweepSpec, member_names, plan_sweep
from unmix.train.store import LiveStore
from unmix.train.trainer import GroupTrainer

Write = Callable[..., str]


@pytest.fixture
def write(run_tree: dict[str, Any], tmp_path: Path) -> Write:
    """Writes a shrunk run file with changes."""

    def do(name: str = "r.yaml", **changes: Any) -> str:
        tree = {**run_tree, "data": {**run_tree["data"], "tokens": 30_000}, **changes}
        tree["train"] = {"tokens": 6000, "batch": 500, "init_rows": 500, "log_every": 3, **changes.get("train", {})}
        tree["evaluate"] = {"tokens": 512, "ablations": ["zero"]}
        path = tmp_path / name
        path.write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}), encoding="utf-8")
        return str(path)

    return do


SEVERAL = {
    "early": {"hook": "layers.0", "n_latents": 64, "k": 4},
    "late": {"hook": "layers.2", "n_latents": 48, "activation": "relu", "train": {"sparsity": 0.01}},
    "across": {"hook": "layers.0", "write": "layers.2", "n_latents": 32, "k": 4, "train": {"seed": 3}},
}


def test_coders_at_several_hooks_come_from_one_forward_pass(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each chunk is captured once, whatever the number of coders; each is what it would be alone."""
    asked: list[int] = []
    inner = LiveStore.chunk

    def counted(self: LiveStore, i: int) -> dict[str, torch.Tensor]:
        asked.append(i)
        return inner(self, i)

    monkeypatch.setattr(LiveStore, "chunk", counted)
    place = write(coder=None, coders=SEVERAL, capture={"cache": "none"})
    out = tmp_path / "out"
    assert main(["index", place, "--out", str(out)]) == 0
    chunks = len(set(asked))
    assert asked[:chunks] == sorted(set(asked), key=asked.index)
    assert len(asked) <= 3 * chunks, "at most once for training, once for the first rows, once for the index"
    assert {path.name for path in (out / "coders").iterdir()} == set(SEVERAL)
    assert load_native(out / "coders" / "across").config.writes == ("blocks.2.resid_post",)
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert set(evaluation["coders"]) == set(SEVERAL)
    assert evaluation["coders"]["early"]["metrics"]["l0"]["value"] <= 4
    index = unmix.open_index(out / "index")
    assert index["late"].n_latents == 48
    assert "across" in capsys.readouterr().out

    alone = write("alone.yaml", coder={**SEVERAL["early"], "name": "early"})
    one = unmix.train(load_run(alone, {"out": str(tmp_path / "alone")}))
    assert one.coder.hash() == load_native(out / "coders" / "early").hash()
    assert (tmp_path / "alone" / "training" / "early" / "curves.svg").is_file()


def test_coders_that_cannot_share_a_stream_are_trained_one_after_another(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run goes on with the group it was in; what is done stays as it is."""
    coders = {
        "a": {"hook": "layers.1", "n_latents": 32, "k": 4},
        "b": {"hook": "layers.1", "n_latents": 32, "k": 4, "train": {"batch": 250}},
    }
    out = tmp_path / "out"
    place = write(coder=None, coders=coders)
    inner = GroupTrainer.run

    def stopped(self: GroupTrainer) -> Any:
        if "b" in self.jobs:
            raise KeyboardInterrupt
        return inner(self)

    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            unmix.train(load_run(place, {"out": str(out)}))
    stamp = (out / "coders" / "a" / "manifest.json").stat().st_mtime_ns
    context = unmix.train(load_run(place, {"out": str(out)}))
    assert context.coders.keys() == coders.keys()
    assert (out / "coders" / "a" / "manifest.json").stat().st_mtime_ns == stamp
    for i, name, steps in ((1, "a", 12), (2, "b", 24)):
        lines = (out / "training" / f"group-{i}" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[-1])["step"] == steps
    hashes = {name: coder.hash() for name, coder in context.coders.items()}
    assert main(["train", place, "--out", str(out), "--redo", "train", "--quiet"]) == 0
    assert {name: load_native(out / "coders" / name).hash() for name in coders} == hashes
    assert (out / "coders" / "a" / "manifest.json").stat().st_mtime_ns != stamp, "asked to be done again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coder": None}, "coder: missing; a run has one coder, or several by name under coders, and not both"),
        ({"coders": SEVERAL}, "coder: missing; a run has one coder"),
        ({"coder": None, "coders": {"a/b": SEVERAL["early"]}}, "coders.a/b: a coder's name is a folder's; try 'a-b'"),
        (
            {"coder": None, "coders": {"a": {**SEVERAL["early"], "train": {"lrr": 1}}}},
            r"coders\.a\.train: unknown field 'lrr'",
        ),
        (
            {"coder": None, "coders": SEVERAL, "train": {"sparsity": 0.1}},
            r"train.sparsity belongs to relu, jumprelu and gated; coders.(early|across).activation is 'topk'",
        ),
    ],
)
def test_what_several_coders_cannot_be(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(write(**changes))


def test_a_stopped_evaluation_goes_on_with_the_next_coder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is measured twice; the file is the same as in one go."""
    from unmix.evaluate import evaluation as room

    place, out = write(coder=None, coders={name: SEVERAL[name] for name in ("early", "late")}), tmp_path / "out"
    measured: list[str] = []
    inner = room.Evaluation.as_dict

    def counted(self: room.Evaluation) -> dict[str, Any]:
        measured.append(str(self.settings["coder"]))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return inner(self)

    monkeypatch.setattr(room.Evaluation, "as_dict", counted)
    words = ["evaluate", place, "--out", str(out), "--quiet"]
    assert main(words) == 130
    assert main(words) == 0
    assert len(measured) == 3
    assert not (out / "evaluations").exists()
    assert main([*words, "--redo", "evaluate"]) == 0
    assert len(measured) == 5


def test_names_and_scores_are_for_one_coder(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is read."""
    assert main(["run", write(coder=None, coders=SEVERAL)]) == 2
    assert "explain, score and report work on one coder, and this run has 3 (across, early, late)" in (
        capsys.readouterr().err
    )


SWEEP = {
    "over": [
        {"coder.activation": ["topk", "batchtopk"], "coder.k": [2, 8]},
        {"coder.activation": ["relu"], "train.sparsity": [0.001, 0.1], "train.seed": [0]},
    ],
}


def test_a_sweep_makes_a_table_and_a_plot(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six members, one run folder, one stream; more latents a token explain more."""
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({**SWEEP, "evaluate": True}, sort_keys=False), encoding="utf-8")
    place, out = write(coder={"hook": "layers.1", "n_latents": 64}, train={"lr": 3e-3}), tmp_path / "out"
    arguments = ["train", place, "--sweep", str(sweep), "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    found = json.loads((out / "sweep.json").read_text(encoding="utf-8"))["members"]
    by_name = {row["member"]: row for row in found}
    assert list(by_name) == [
        "topk-k2", "topk-k8", "batchtopk-k2", "batchtopk-k8", "relu-sparsity0.001-seed0", "relu-sparsity0.1-seed0",
    ]  # fmt: skip
    assert by_name["topk-k8"]["evaluation"]["fvu"] < by_name["topk-k2"]["evaluation"]["fvu"]
    assert by_name["topk-k2"]["training"]["l0"] <= 2
    assert by_name["topk-k2"]["evaluation"]["ce_increase"] is not None
    assert unmix.load(out / by_name["topk-k8"]["coder"]).config.activation.k == 8
    plot = ElementTree.parse(out / "pareto.svg").getroot()
    titles = [e.text for e in plot.iter("{http://www.w3.org/2000/svg}title")]
    assert set(by_name) <= set(titles)
    shown = capsys.readouterr().out
    assert "batchtopk-k8" in shown
    assert "CE increase" in shown
    before = (out / "sweep.json").read_bytes()
    assert main(arguments) == 0
    assert (out / "sweep.json").read_bytes() == before


def test_fields_outside_coder_and_training_make_runs_of_their_own(tmp_path: Path) -> None:
    tree = {"model": {"name": "m"}, "coder": {"hook": "layers.1"}, "train": {"lr": 0.01}}
    spec = SweepSpec.model_validate({"over": {"seed": [0, 1], "coder.k": [2, 4], "train.lr": [0.1]}})
    parts = plan_sweep(spec, tree, tmp_path, "r.yaml")
    assert [list(part.members) for part in parts] == [["seed0-k2", "seed0-k4"], ["seed1-k2", "seed1-k4"]]
    assert [part.config.out for part in parts] == [tmp_path / "runs" / "seed0", tmp_path / "runs" / "seed1"]
    assert parts[1].config.seed == 1
    assert parts[0].config.members()["seed0-k4"].spec.k == 4
    assert parts[0].config.members()["seed0-k4"].train.lr == 0.1


def test_random_draws_are_the_same_every_time() -> None:
    tree = {"method": "random", "samples": 9, "over": {"train.lr": {"low": 1e-4, "high": 1e-2}, "coder.k": [2, 4, 8]}}
    drawn = SweepSpec.model_validate(tree).settings()
    assert drawn == SweepSpec.model_validate(tree).settings()
    assert len(drawn) == 9
    assert all(1e-4 <= one["train.lr"] <= 1e-2 and one["coder.k"] in (2, 4, 8) for one in drawn)
    assert drawn != SweepSpec.model_validate({**tree, "seed": 1}).settings()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"over": {}}, "over: at least one field with values is needed"),
        ({"over": {"coder.k": []}}, r"over\.coder\.k: no values"),
        ({"over": {"coder.k": [1]}, "samples": 3}, "samples belongs to method: random, which needs it"),
        ({"over": {"train.lr": {"low": 1, "high": 2}}}, r"over\.train\.lr: a range needs method: random"),
        ({"over": {"train.lr": {"low": 2, "high": 2}}}, "low must be smaller"),
    ],
)
def test_what_a_sweep_cannot_be(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepSpec.model_validate(tree)


def test_a_sweep_ends_before_explanations(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    assert main(["run", write(), "--sweep", str(sweep)]) == 2
    assert "a sweep goes up to one of the stages train, evaluate, index" in capsys.readouterr().err


def test_a_member_that_cannot_be_is_named(tmp_path: Path) -> None:
    tree = {"model": {"name": "m"}, "coder": {"hook": "layers.1"}}
    spec = SweepSpec.model_validate({"over": {"coder.kk": [1, 2]}})
    with pytest.raises(ConfigError, match=r"r\.yaml, member kk1: unknown field 'kk'. Did you mean 'k'"):
        plan_sweep(spec, tree, tmp_path, "r.yaml")


def test_names_of_members_are_unique() -> None:
    assert member_names([{"coder.k": 1}, {"coder.k": 2}]) == ["k1", "k2"]
    one, other = member_names([{"a.x": "p q"}, {"a.x": "p-q"}])
    assert one != other
    assert Range(low=1, high=2).log


def test_one_coder_of_many_reads_back_from_its_run_folder(write: Write) -> None:
    config = load_run(write(coder=None, coders=SEVERAL))
    again = RunConfig.model_validate(config.model_dump(mode="json"))
    assert again.members() == config.members()
