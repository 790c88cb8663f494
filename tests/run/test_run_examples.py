"""The run and sweep files under `examples/` of this room, shrunk by flags: each goes its whole way on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["train", str(EXAMPLES / "tracked.yaml"), *shrunk, "--hook", "layers.1", "--out", str(tmp_path / "out")]
    assert main(words) == 3
    assert "tracker wandb needs the package 'wandb': pip install 'unmix[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokens").exists(), "said before anything is read"
    alone = ["--train.trackers", "[]", "--train.held_out", "200"]
    assert main([*words, *alone]) == 2
    assert "tracking.upload keeps the coder as an artifact of wandb" in capsys.readouterr().err
    assert main([*words, *alone, "--train.tracking.upload", "false"]) == 0


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


def test_the_whole_stream_is_said_and_kept(shrunk: list[str], tmp_path: Path) -> None:
    """The policy ends in the coder's config, and the activations stay for another coder."""
    import unmix

    out = tmp_path / "out"
    words = ["train", str(EXAMPLES / "stream.yaml"), *shrunk, "--hook", "layers.1", "--out", str(out), "--quiet"]
    assert main(words) == 0
    cache = {path: path.stat().st_mtime_ns for path in out.rglob("activations/**/*") if path.is_file()}
    assert cache
    policy = unmix.load(out / "coders" / "layers.1").config.input_policy
    assert (policy.attend_across, policy.skip_first, policy.separator_id) == (False, 1, 0)
    assert main([*words, "--coder.k", "16", "--redo", "train"]) == 0
    assert unmix.load(out / "coders" / "layers.1").config.activation.k == 16
    assert cache == {path: path.stat().st_mtime_ns for path in out.rglob("activations/**/*") if path.is_file()}


@pytest.mark.parametrize("name", ["groupmax", "topk-annealed", "guarded"])
def test_coders_with_aids(name: str, shrunk: list[str], tmp_path: Path) -> None:
    """The term, the mean, the held-out figures that each is about are in its log and its folder."""
    out = tmp_path / "out"
    more = ["--hook", "layers.1", "--coder.n_latents", "128", "--train.held_out", "200", "--train.held_out_every", "2"]
    more += ["--train.checkpoint_every", "2"] if name == "guarded" else []
    assert main(["train", str(EXAMPLES / f"{name}.yaml"), *shrunk, *more, "--out", str(out), "--quiet"]) == 0
    (log,) = out.rglob("metrics.jsonl")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert any("held_out/fvu" in record for record in records)
    assert ("loss/multi_topk" in records[-1]) == (name == "topk-annealed")
    if name == "topk-annealed":
        # L0 of the first step is k_start's; the last is the coder's own.
        assert records[0]["l0"] > 2 * records[-1]["l0"]


@pytest.mark.parametrize("stored_as", ["jsonl", "npy"])
def test_tokenised_text(stored_as: str, shrunk: list[str], tmp_path: Path) -> None:
    """Rows of 40 ids, which contexts of 32 are cut from; the policy puts no BOS before them."""
    import numpy as np

    from unmix.data import TokenShards

    rows = np.random.default_rng(0).integers(2, 512, (300, 40))
    place = tmp_path / f"ids.{stored_as}"
    if stored_as == "npy":
        np.save(place, rows.astype(np.uint16))
    else:
        place.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    out = tmp_path / "out"
    more = ["--data", str(place), "--data.tokens", "9000", "--hook", "layers.1", "--out", str(out), "--quiet"]
    assert main(["train", str(EXAMPLES / "tokenised.yaml"), *shrunk, *more]) == 0
    shards = TokenShards.open(out / "tokens")
    contexts = shards.tokens(range(shards.n_contexts)).tolist()
    assert {tuple(context) for context in contexts} <= {tuple(row) for row in rows[:, :32].tolist()}


@pytest.mark.slow
def test_two_processes_hold_half_of_the_latents_each(shrunk: list[str], tmp_path: Path) -> None:
    """As its comment says: torchrun, and the mesh of the file."""
    import unmix

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "unmix"]
    out = tmp_path / "out"
    words = ["train", str(EXAMPLES / "parallel.yaml"), *shrunk, "--hook", "layers.1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert unmix.load(out / "coders" / "layers.1").config.n_latents == 16 * 32


def test_every_example_is_listed_and_tested() -> None:
    """In examples/README.md, and by name in a test."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".py")}
    assert files == {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}
    assert set(re.findall(r"\]\(([\w.-]+)\)", text)) == files
    tests = "".join(path.read_text(encoding="utf-8") for path in EXAMPLES.parent.joinpath("tests").rglob("test_*.py"))
    assert [name for name in sorted(files) if not re.search(rf"[\"/]{re.escape(Path(name).stem)}[.\"]", tests)] == []
