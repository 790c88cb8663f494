"""Run files: everything that can be wrong in one is said at once, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unmix.core.errors import ConfigError
from unmix.run.config import builtin_runs, load_run


def write(tmp_path: Path, tree: Any) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


GOOD = {"model": {"name": "m"}, "coder": {"hook": "layers.1", "k": 4, "n_latents": 64}}


def test_overrides_and_shorthands(tmp_path: Path) -> None:
    config = load_run(
        write(tmp_path, GOOD), {"data": "text.txt", "coder.k": "8", "data.tokens": "10M", "model": "gpt2"}
    )
    assert config.data.source == "text.txt"
    assert config.coder.k == 8
    assert config.data.tokens == 10_000_000
    assert config.model.name == "gpt2"
    assert config.out == Path("runs/r")


@pytest.mark.parametrize("name", builtin_runs())
def test_built_in_runs_are_valid(name: str) -> None:
    assert load_run(f"builtin:{name}").out == Path("runs") / name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coder": {"hook": "x", "kk": 3}}, r"unknown field 'coder\.kk'. Did you mean 'k'"),
        ({"trian": {}}, "unknown field 'trian'. Did you mean 'train'"),
        ({"coder": {"k": 3}}, "coder.hook: missing"),
        ({"coder": {"hook": "x", "k": 100, "n_latents": 64}}, "k is 100, larger than n_latents = 64"),
        ({"coder": {"hook": "x", "k": 0}}, "coder.k: Input should be greater than 0"),
        (
            {"coder": {"hook": "x", "activation": "relu", "k": 4}},
            "k belongs to topk, batchtopk and groupmax; activation is 'relu'",
        ),
        ({"coder": {"hook": "x", "threshold": 0.2}}, "threshold belongs to jumprelu; activation is 'topk'"),
        ({"train": {"sparsity": 0.1}}, "sparsity belongs to relu, jumprelu and gated; coder.activation is 'topk'"),
        ({"train": {"warmup": 0.8, "decay": 0.5}}, r"warmup \+ decay is 1\.3, at most 1"),
        ({"explain": {"scorers": []}}, "explain: at least one scorer is needed"),
        ({"explain": {"explainers": ["ngramm"]}}, "unknown explainer 'ngramm'. Did you mean 'ngram'"),
        ({"explain": {"scorers": ["fuzzing"]}}, "scorer 'fuzzing' asks a language model: set client.base_url"),
        ({"explain": {"explainers": ["llm"]}}, "explainer 'llm' asks a language model"),
    ],
)
def test_bad_fields(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run(write(tmp_path, {**GOOD, **change}))


def test_places_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        load_run(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match=r"is a folder without run\.yaml"):
        load_run(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no built-in run 'dmeo'. Did you mean 'demo'"):
        load_run("builtin:dmeo")


def test_a_run_file_written_out_whole_reads_back(tmp_path: Path) -> None:
    """The run folder keeps every field, those of other activations at their defaults included."""
    config = load_run(write(tmp_path, {"model": {"name": "m"}, "coder": {"hook": "x", "activation": "jumprelu"}}))
    again = load_run(write(tmp_path, config.model_dump(mode="json", exclude={"out"})))
    assert again.coder == config.coder
