"""What a training is refused for before a model is loaded or a text read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unmix.cli import main
from unmix.core.errors import ConfigError
from unmix.run.checking import check_member, mesh_sizes
from unmix.run.config import RunConfig


def config(coder: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    tree = {"model": {"name": "nowhere"}, "coder": {"hook": "layers.1", **(coder or {})}, "train": train or {}, **more}
    return RunConfig.model_validate(tree)


def check(found: RunConfig) -> None:
    for member in found.members().values():
        check_member(member, found)


@pytest.mark.parametrize(
    ("coder", "train", "message"),
    [
        ({}, {"objective": [{"term": "mse"}, {"term": "l0"}]}, "l0 belongs to jumprelu"),
        ({}, {"objective": [{"term": "mse"}, {"term": "gate"}]}, "the term gate belongs to gated coders"),
        ({"activation": "relu"}, {"objective": [{"term": "mse"}, {"term": "multi_topk"}]}, "multi_topk"),
        ({"n_latents": 64}, {"prefixes": [16, 64]}, "the prefix 64 is not smaller than n_latents = 64"),
        ({"activation": "relu"}, {"k_start": 64}, "k_start belongs to topk and batchtopk"),
        ({"n_latents": 64}, {"k_start": 65}, "k_start is 65; .* has k = 32 and 64 latents"),
        ({}, {"objective": [{"term": "downstream", "hooks": []}]}, "downstream needs hooks"),
        ({}, {"resample": [0.5], "optimiser": "adam8bit"}, r"train\.resample forgets what"),
    ],
)
def test_an_impossible_objective_is_refused(coder: dict[str, Any], train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config(coder, train))


@pytest.mark.parametrize(
    ("coder", "train"),
    [
        ({}, {"prefixes": [4096, 100_000]}),
        ({}, {"k_start": 100_000}),
        ({"activation": "groupmax", "k": 48}, {}),
        ({"activation": "gated"}, {"sparsity": 0.1}),
        ({"hook": ["layers.1", "layers.2"]}, {}),
        ({"write": ["layers.1", "layers.2"], "skip": True}, {}),
    ],
)
def test_what_depends_on_the_width_waits_for_it(coder: dict[str, Any], train: dict[str, Any]) -> None:
    check(config(coder, train))


def test_it_is_said_before_the_model_is_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's name is nobody's, and nobody notices."""
    path = tmp_path / "r.yaml"
    tree = {
        "model": {"name": str(tmp_path / "nowhere")}, "data": {"source": str(tmp_path)}, "coder": {"hook": "layers.1"},
        "train": {"objective": [{"term": "mse"}, {"term": "l0"}]},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "l0 belongs to jumprelu" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_the_mesh_is_checked_on_paper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Under torchrun, from what its environment says."""
    gated = config({"activation": "gated"})
    check(gated)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert mesh_sizes(gated) == (4, 1)
    assert mesh_sizes(config(parallel={"dictionary": 2})) == (2, 2)
    assert mesh_sizes(config(parallel={"coders": 4})) == (1, 1)
    with pytest.raises(ConfigError, match="the term gate is not trained on a mesh; allowed: mse, auxk, l1, l0"):
        check(gated)
    check(config({"activation": "gated"}, parallel={"coders": 4}))
    check(config(train={"on_nonfinite": "skip"}, parallel={"dictionary": 2}))
    with pytest.raises(ConfigError, match="the term kl is not trained on a mesh"):
        check(config(train={"objective": [{"term": "mse"}, {"term": "kl"}]}))
    several = {"x": {"hook": "layers.1", "write": "layers.2"}}
    tree = {"model": {"name": "m"}, "coders": several, "coder_set": "clt", "parallel": {"coders": 4}}
    with pytest.raises(ConfigError, match="coder_set: coders whose writes add up are trained by one process"):
        check(RunConfig.model_validate(tree))


def test_a_step_is_taken_again_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "m"}, "coder": {"hook": "layers.1"}}), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(path), "--replay", "last"]) == 2
    assert "--replay is the work of one process; start it without torchrun" in capsys.readouterr().err
