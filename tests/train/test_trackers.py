"""Trackers, with stand-ins for their libraries: what they are given, and what is said where something is missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from unmix.core.errors import MachineError, ServiceError
from unmix.core.plot import Panel, Series, draw
from unmix.train.config import OptimConfig, Tracking
from unmix.train.curves import write_curves
from unmix.train.feeds import RowFeed
from unmix.train.source import TensorSource
from unmix.train.trackers import TRACKERS, Session, check_trackers, secret, start_trackers
from unmix.train.trainer import GroupTrainer, Job

from .toys import coder_config, planted


class Calls:
    """Remembers every call below it."""

    def __init__(self, made: list[tuple[str, Any]], name: str = "") -> None:
        self._made, self._name = made, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Calls(self._made, f"{self._name}.{name}".strip("."))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._made.append((self._name, (args, kwargs)))
        return Calls(self._made, self._name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Calls that reached any of the three libraries."""
    calls: list[tuple[str, Any]] = []
    for name in ("wandb", "trackio", "torch.utils.tensorboard"):
        library = types.ModuleType(name)
        for attribute in ("init", "login", "log", "finish", "Artifact", "SummaryWriter"):
            setattr(library, attribute, Calls(calls, f"{name}.{attribute}"))
        library.api = types.SimpleNamespace(api_key=None)  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return calls


def session(folder: Path, **tracking: Any) -> Session:
    return Session("run one", "abc123", folder, {"lr": 0.1}, Tracking(**tracking))


def train(folder: Path, name: str, coders: int = 1, **tracking: Any) -> None:
    config = OptimConfig(batch=32, tokens=320, init_rows=64, log_every=5)
    jobs = {f"c{i}": Job(coder_config(name=f"c{i}"), config) for i in range(coders)}
    trackers = start_trackers([name], session(folder, **tracking))
    feed = RowFeed(TensorSource(planted(400, 8, 12, 2)[0]))
    GroupTrainer(jobs, feed, folder, "key", trackers=trackers).run()
    for tracker in trackers:
        tracker.upload("c0", folder)
        tracker.finish()


def test_wandb(tmp_path: Path, made: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run for a resumed training; the key from the environment is used and not passed on."""
    monkeypatch.setenv("WANDB_API_KEY", "sesame")
    train(tmp_path, "wandb", project="p")
    assert made[0] == ("wandb.login", ((), {"key": "sesame"}))
    started = made[1][1][1]
    assert (started["project"], started["id"], started["resume"]) == ("p", "abc123", "allow")
    assert (started["mode"], started["config"]) == ("online", {"lr": 0.1})
    assert "sesame" not in str(made[1:])
    logged = [call for name, call in made if name == "wandb.init.log"]
    assert [call[1]["step"] for call in logged] == [5, 5, 10, 10]
    assert {"loss", "fvu", "l0", "dead", "lr", "loss/mse"} <= logged[0][0][0].keys()
    assert logged[1][0][0]["tokens"] == 160
    names = [name for name, _ in made]
    assert names[-4:] == ["wandb.Artifact", "wandb.Artifact.add_dir", "wandb.init.log_artifact", "wandb.init.finish"]


def test_wandb_without_a_key_or_offline(tmp_path: Path, made: list[tuple[str, Any]]) -> None:
    with pytest.raises(MachineError, match=r"no key in WANDB_API_KEY or \.env; set one, or --train\.tracking\.offline"):
        start_trackers(["wandb"], session(tmp_path))
    start_trackers(["wandb"], session(tmp_path, offline=True))
    assert [name for name, _ in made] == ["wandb.init"]
    assert made[0][1][1]["mode"] == "offline"


def test_whether_a_tracker_could_start_is_asked_first(tmp_path: Path, made: list[tuple[str, Any]]) -> None:
    """Nothing is sent for it."""
    with pytest.raises(MachineError, match="no key in WANDB_API_KEY"):
        check_trackers(["tensorboard", "wandb"], Tracking())
    check_trackers(["wandb", "trackio", "tensorboard"], Tracking(offline=True))
    assert made == []


def test_an_artifact_that_is_not_taken(
    tmp_path: Path, made: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says where the coder is."""
    (tracker,) = start_trackers(["wandb"], session(tmp_path, offline=True))
    tracker.upload("c0", tmp_path)
    assert next(call for name, call in made if name == "wandb.Artifact")[1]["metadata"] == {"lr": 0.1}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("quota exceeded")

    monkeypatch.setattr(sys.modules["wandb"], "Artifact", full)
    with pytest.raises(
        ServiceError, match=r"did not take the artifact c0 \(OSError: quota exceeded\); the coder is whole"
    ):
        tracker.upload("c0", tmp_path)


def test_trackio_and_several_coders(tmp_path: Path, made: list[tuple[str, Any]]) -> None:
    """Figures of several coders stand under their names."""
    train(tmp_path, "trackio", coders=2)
    logged = [call for name, call in made if name == "trackio.log"]
    assert {"c0/fvu"} <= logged[0][0][0].keys()
    assert {"c1/fvu"} <= logged[1][0][0].keys()
    assert made[-1][0] == "trackio.finish"


def test_tensorboard(tmp_path: Path, made: list[tuple[str, Any]]) -> None:
    train(tmp_path, "tensorboard")
    assert made[0][1][1] == {"log_dir": str(tmp_path / "tensorboard")}
    scalars = [call[0] for name, call in made if name.endswith("add_scalar")]
    assert ("fvu", 10) in [(tag, step) for tag, _, step in scalars]
    assert made[-1][0].endswith("close")


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(
        MachineError, match=rf"tracker {name} needs the package '{name}': pip install 'unmix\[{name}\]'"
    ):
        start_trackers([name], session(tmp_path))


def test_names_in_the_config_are_those_of_the_registry() -> None:
    config = OptimConfig(trackers=("wandb", "trackio", "tensorboard"))
    assert list(config.trackers) == TRACKERS.names()


def test_keys_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment wins; comments, quotes and `export` are understood."""
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert secret("SOME_KEY", tmp_path) is None
    (tmp_path / ".env").write_text("# SOME_KEY=no\nOTHER=1\nexport SOME_KEY='from file'\n", encoding="utf-8")
    assert secret("SOME_KEY", tmp_path) == "from file"
    monkeypatch.setenv("SOME_KEY", "from environment")
    assert secret("SOME_KEY", tmp_path) == "from environment"


SVG = "{http://www.w3.org/2000/svg}"


def test_curves_are_drawn_from_the_metrics(tmp_path: Path) -> None:
    """Four panels, one line each, as long as the log."""
    config = OptimConfig(batch=32, tokens=320, init_rows=64, log_every=1)
    jobs = {"c": Job(coder_config(name="c"), config)}
    GroupTrainer(jobs, RowFeed(TensorSource(planted(400, 8, 12, 2)[0])), tmp_path, "key").run()
    write_curves(tmp_path, ["c"])
    root = ElementTree.parse(tmp_path / "c" / "curves.svg").getroot()
    lines = root.findall(f".//{SVG}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [10] * 4


def test_points_lie_where_their_values_say() -> None:
    """Larger is further right and further up; nothing is outside; names are escaped; NaN is left out."""
    points = [(1.0, 5.0), (10.0, 1.0), (100.0, 3.0), (float("nan"), 2.0)]
    panel = Panel("a < b", "L0", "FVU", [Series("x & y", points, labels=["one", "two", "three", "none"])], log_x=True)
    root = ElementTree.fromstring(draw([panel], "t"))
    circles = root.findall(f".//{SVG}g//{SVG}circle")
    found = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in circles]
    assert [c.findtext(f"{SVG}title") for c in circles] == ["one", "two", "three"]
    (x1, y1), (x2, y2), (x3, y3) = found
    assert x1 < x2 < x3
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 < y3 < y2
    assert all(58 <= x <= 348 and 28 <= y <= 218 for x, y in found)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"a < b", "x & y", "1", "2", "50"} <= set(texts)


def test_a_plot_of_nothing_or_of_one_value() -> None:
    assert "no figures" in draw([Panel("p", "x", "y", [])], "t")
    ElementTree.fromstring(draw([Panel("p", "x", "y", [Series("", [(0.0, 0.0)], line=True)])], "t"))
