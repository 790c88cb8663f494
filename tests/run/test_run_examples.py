"""The run and sweep files under `examples/` of this room, shrunk by flags: each goes its whole way on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from unmix.cli import main
from unmix.core.config import parse_overrides
from unmix.run.config import load_run
from unmix.run.sweep import plan_sweep, read_sweep

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def shrunk(tiny_model_folder: Path, text_folder: Path) -> list[str]:
    """Flags that make any of them take seconds."""
    flags = {
        "model": str(tiny_model_folder), "model.dtype": "float32", "data": str(text_folder), "data.tokens": "20000",
        "data.context": "32", "train.tokens": "1500", "train.batch": "250", "train.init_rows": "500",
        "evaluate.tokens": "256", "train.log_every": "1",
    }  # fmt: skip
    return [word for key, value in flags.items() for word in (f"--{key}", value)]


def test_the_pareto_plot_is_one_command(shrunk: list[str], tmp_path: Path) -> None:
    """Twenty-four members of one stream, each evaluated; the plot has two panels and all of them."""
    out = tmp_path / "pareto"
    files = [str(EXAMPLES / "pareto.yaml"), "--sweep", str(EXAMPLES / "pareto-sweep.yaml")]
    more = ["--hook", "layers.1", "--coder.expansion", "3"]
    assert main(["train", *files, *shrunk, *more, "--out", str(out), "--quiet"]) == 0
    rows = json.loads((out / "sweep.json").read_text(encoding="utf-8"))["members"]
    assert len(rows) == 24
    assert rows[12]["member"] == "jumprelu-seed0-sparsity0.3-target_l0_16"
    assert all(row["evaluation"]["ce_increase"] is not None for row in rows)
    plot = (out / "pareto.svg").read_text(encoding="utf-8")
    assert plot.count("<circle") == 2 * 24 + 4
    assert "CE increase, nats" in plot


def test_the_pareto_files_fit_the_real_model() -> None:
    tree = yaml.safe_load((EXAMPLES / "pareto.yaml").read_text(encoding="utf-8"))
    (part,) = plan_sweep(read_sweep(EXAMPLES / "pareto-sweep.yaml"), tree, Path("out"), "pareto.yaml")
    assert {m.spec.activation for m in part.config.members().values()} == {"topk", "batchtopk", "jumprelu", "gated"}
    assert len(part.members) == 24


def test_several_coders(shrunk: list[str], tmp_path: Path) -> None:
    place = str(EXAMPLES / "several.yaml")
    hooks = {"early": "layers.0", "late": "layers.2", "late-wide": "layers.2"}
    flags = [word for name, hook in hooks.items() for word in (f"--coders.{name}.hook", hook)]
    assert main(["train", place, *shrunk, *flags, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "coders").iterdir()) == ["early", "late", "late-wide"]


def test_the_tracked_run_without_its_library(
    shrunk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every other field of it trains; the library that is missing is named."""
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["train", str(EXAMPLES / "tracked.yaml"), *shrunk, "--hook", "layers.1", "--out", str(tmp_path / "out")]
    assert main(words) == 3
    assert "tracker wandb needs the package 'wandb': pip install 'unmix[wandb]'" in capsys.readouterr().err
    assert main([*words, "--train.trackers", "[]", "--train.held_out", "200"]) == 0


def test_the_sweep_files_are_valid() -> None:
    """What W&B's agent would say is what the command line reads."""
    assert len(read_sweep(EXAMPLES / "random-sweep.yaml").settings()) == 8
    sweep = yaml.safe_load((EXAMPLES / "wandb-sweep.yaml").read_text(encoding="utf-8"))
    drawn = [f"--{name}={spec.get('values', [spec.get('min')])[0]}" for name, spec in sweep["parameters"].items()]
    flags = [word for word in sweep["command"][3:] if word != "${args}"] + drawn
    config = load_run(sweep["command"][2], parse_overrides(flags))
    assert config.train.trackers == ("wandb",)
    assert config.coder is not None
    assert config.coder.k == 16
