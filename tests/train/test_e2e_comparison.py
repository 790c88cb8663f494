"""The comparison of objectives, shrunk: `examples/e2e_comparison.py` with `examples/e2e-comparison.yaml`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from unmix.run.config import load_run

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("e2e_comparison", EXAMPLES / "e2e_comparison.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shrunk(name: str, model_folder: Path, folder: Path) -> Path:
    """Fewer tokens, latents and layers; every other field as it stands."""
    tree: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for i in range(40):
        lines = [f"Line {n} of page {i}: the sum of {n} and {i} is {n + i}." for n in range(12)]
        (text / f"{i}.txt").write_text("\n".join(lines))
    tree["model"] = {"name": str(model_folder), "dtype": "float32"}
    tree["data"] |= {"source": str(text), "tokens": 4000, "context": 32}
    tree["train"] |= {"batch": 128, "tokens": 768, "init_rows": 256, "log_every": 1}
    if "evaluate" in tree:
        tree["evaluate"] |= {"tokens": 320}
    for coder in tree["coders"].values() if "coders" in tree else [tree["coder"]]:
        coder |= {"hook": "layers.0", "n_latents": 64, "k": 4}
        for spec in coder.get("train", {}).get("objective", []):
            if "hooks" in spec:
                spec["hooks"] = ["layers.1", "layers.2"]
    place = folder / f"{name}.yaml"
    place.write_text(yaml.safe_dump(tree, sort_keys=False))
    return place


def test_one_coder_is_continued_and_the_table_pairs_what_came_of_it(
    script: ModuleType, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """All begin as the local coder; CE, KL and FVU are the evaluation's own."""
    for name in ("e2e-local", "e2e-comparison"):
        load_run(str(EXAMPLES / f"{name}.yaml"))
    files = [str(shrunk(name, model_folder, tmp_path)) for name in ("e2e-local", "e2e-comparison")]
    out = tmp_path / "out"
    command = ["e2e_comparison", "--local", files[0], "--continued", files[1], "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    script.main()
    logs = {
        name: json.loads((out / "continued" / "training" / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("local", "kl", "kl-downstream")
    }
    assert logs["kl"]["fvu"] == logs["local"]["fvu"] == logs["kl-downstream"]["fvu"]
    found = json.loads((out / "comparison.json").read_text())
    evaluated = json.loads((out / "continued" / "evaluation.json").read_text())["coders"]
    for name, one in evaluated.items():
        for figure, theirs in (("ce_increase", "ce_increase"), ("kl", "kl_spliced"), ("fvu", "fvu")):
            assert found[f"{name} {figure}"]["value"] == pytest.approx(one["metrics"][theirs]["value"], abs=1e-5)
        assert found[f"{name} later"]["value"] > 0
    assert found["local ce_increase difference"]["value"] == 0
    gap = found["kl fvu"]["value"] - found["local fvu"]["value"]
    assert found["kl fvu difference"]["value"] == pytest.approx(gap, abs=1e-12)
    assert found["before fvu"]["value"] > found["local fvu"]["value"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[4:]] == ["before", "local", "kl", "kl-downstream"]
    assert len({line.count("|") for line in printed[2:]}) == 1


def test_variance_comes_from_batches(script: ModuleType) -> None:
    """Mean of ‖x − mean‖² over rows."""
    torch.manual_seed(0)
    x = torch.randn(10, 3) + 5
    spread = script.Spread()
    spread.add({"a": x[:4]})
    spread.add({"a": x[4:]})
    assert spread.variances()["a"] == pytest.approx(float((x - x.mean(0)).square().sum() / 10), rel=1e-5)
