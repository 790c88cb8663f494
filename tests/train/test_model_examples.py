"""The run files that train through the model, shrunk: each by the whole way from text to a saved coder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmix.core.errors import ModelError
from unmix.run.config import load_run
from unmix.run.public import train

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = {"e2e": {"kl"}, "e2e-downstream": {"kl", "downstream"}, "kl-finetune": {"kl"}}


def shrunk(name: str, model_folder: Path, folder: Path) -> dict[str, Any]:
    """Fewer tokens, latents and layers; every other field as it stands."""
    tree = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for i in range(40):
        lines = [f"Line {n} of page {i}: the sum of {n} and {i} is {n + i}." for n in range(12)]
        (text / f"{i}.txt").write_text("\n".join(lines))
    tree["model"] = {"name": str(model_folder), "dtype": "float32"}
    tree["data"] |= {"source": str(text), "tokens": 3000, "context": 32}
    tree["coder"] |= {"hook": "layers.0", "n_latents": 64, "k": 4}
    tree["train"] |= {"batch": 128, "epochs": 1, "init_rows": 256, "log_every": 1, "checkpoint_every": 5}
    for spec in tree["train"]["objective"]:
        if "hooks" in spec:
            spec["hooks"] = ["layers.1", "layers.2"]
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_trains_through_the_model(name: str, model_folder: Path, tmp_path: Path) -> None:
    """The terms act when their file says so, and the file names its own commands."""
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"unmix train examples/{name}.yaml" in text
    assert f"unmix run examples/{name}.yaml" in text
    load_run(str(EXAMPLES / f"{name}.yaml"))
    place = tmp_path / "run.yaml"
    place.write_text(yaml.safe_dump({**shrunk(name, model_folder, tmp_path), "out": str(tmp_path / "run")}))
    context = train(place)
    (log,) = (tmp_path / "run").rglob("metrics.jsonl")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    terms = [{key.removeprefix("loss/") for key in record if key.startswith("loss/")} for record in records]
    assert terms[-1] >= NAMES[name]
    assert ("kl" in terms[0]) == (name != "kl-finetune")
    assert context.coder.config.n_latents == 64


def test_a_hook_that_is_not_there_is_said_before_any_text_is_read(model_folder: Path, tmp_path: Path) -> None:
    """Downstream hooks too."""
    tree = shrunk("e2e-downstream", model_folder, tmp_path)
    tree["train"]["objective"][1]["hooks"] = ["layers.7"]
    place = tmp_path / "run.yaml"
    place.write_text(yaml.safe_dump({**tree, "out": str(tmp_path / "run")}))
    with pytest.raises(ModelError, match=r"there is no layer 7; this model has layers 0 to 2"):
        train(place)
    assert not (tmp_path / "run" / "tokens").exists()
