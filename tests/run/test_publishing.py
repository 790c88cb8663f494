"""Finished coders on the hub: asked about before anything is done, pushed once, with the run's figures on the card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import unmix
from formats.sources.standin import Hub, running
from unmix.cli import main
from unmix.coder.native import load_native
from unmix.core.atomic import write_json
from unmix.core.errors import FormatError, ServiceError
from unmix.formats.publishing import push_to_hub, require_access
from unmix.run.config import load_run
from unmix.run.context import RunContext
from unmix.run.publishing import check_publishing, publish

# huggingface-hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """In place of the real one; a token is in the environment."""
    import huggingface_hub.constants as constants

    (tmp_path / "repo").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running(Hub(tmp_path / "repo")) as server:
        monkeypatch.setattr("unmix.run.publishing.push_to_hub", partial(push_to_hub, endpoint=server.url))
        monkeypatch.setattr("unmix.run.publishing.require_access", partial(require_access, endpoint=server.url))
        yield server


@pytest.fixture
def small(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    """A run of two coders that takes a second."""
    coders = {"a": {"hook": "layers.1", "n_latents": 32, "k": 4}, "b": {"hook": "layers.0", "n_latents": 32, "k": 4}}
    tree = {key: value for key, value in run_tree.items() if key != "coder"} | {"coders": coders}
    tree["data"] = {**run_tree["data"], "tokens": 12_000}
    tree["train"] = {"tokens": 1000, "batch": 250, "init_rows": 250}
    tree["evaluate"] = {"tokens": 128, "ablations": ["zero"]}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_finished_coders_are_pushed_once(
    hub: Hub, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below their names; the card has the evaluation. A push that failed is made up for without training."""
    out = tmp_path / "out"
    hub.refuses_objects = True
    words = ["evaluate", str(small), "--out", str(out), "--push-to-hub", "me/coders", "--publish.path", "runs/1"]
    assert main([*words, "--quiet"]) == 3
    said = capsys.readouterr().err
    assert "The run is whole: the same command pushes again and trains nothing" in said
    assert "hf_secret" not in said
    assert hub.pushed == {}
    hub.refuses_objects = False
    monkeypatch.setattr("unmix.run.training.train_group", None)
    assert main(words) == 0
    assert {name for name in hub.pushed if name.endswith("config.json")} == {
        "runs/1/a/config.json", "runs/1/b/config.json"
    }  # fmt: skip
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    fvu = evaluation["coders"]["b"]["metrics"]["fvu"]["value"]
    assert f"| fvu | {fvu:.4g} |" in hub.pushed["README.md"].decode()
    (tmp_path / "back").mkdir()
    for name, data in hub.pushed.items():
        if name.startswith("runs/1/a/"):
            (tmp_path / "back" / Path(name).name).write_bytes(data)
    assert unmix.load(tmp_path / "back").hash() == load_native(out / "coders" / "a").hash()
    hub.pushed.clear()
    assert main(words) == 0
    assert hub.pushed == {}
    assert "a is at" in capsys.readouterr().err
    assert json.loads((out / "training" / "published.json").read_text(encoding="utf-8")).keys() == {"a", "b"}


def config_of(place: Path, **publishing: Any) -> Any:
    return load_run(str(place), {f"publish.{key}": str(value) for key, value in publishing.items()})


def test_what_cannot_be_pushed_is_said_before_anything_is_done(
    hub: Hub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name, a format, a token, a hub: no model is loaded, no text read, no folder begun."""
    assert main(["train", str(small), "--push-to-hub", "coders"]) == 2
    assert "publish: 'coders': not the name of a repository; expected owner/name" in capsys.readouterr().err
    with pytest.raises(FormatError, match=r"publish\.format: 'sae_lense' cannot be written\. Did you mean 'sae_lens'"):
        check_publishing(config_of(small, hub="me/coders", format="sae_lense"))
    check_publishing(config_of(small, hub="me/coders", format="sae_lens"))
    assert hub.tokens == {"Bearer hf_secret"}
    hub.status = 401
    monkeypatch.setattr("unmix.lm.load.load_model", None)
    out = tmp_path / "out"
    assert main(["train", str(small), "--out", str(out), "--push-to-hub", "me/coders"]) == 2
    assert "me/coders: the hub refuses to write there (401)" in capsys.readouterr().err
    assert not (out / "tokens").exists()
    hub.status = 500
    with pytest.raises(ServiceError, match=r"the hub does not answer .* without publish the run begins, and"):
        check_publishing(config_of(small, hub="me/coders"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="me/coders: writing needs a token: hf auth login"):
        check_publishing(config_of(small, hub="me/coders"))
    check_publishing(load_run(str(small)))


def test_a_token_may_lie_beside_the_run(hub: Hub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / ".env").write_text("HF_TOKEN=hf_of_file\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    check_publishing(config_of(small, hub="me/coders"))
    assert hub.tokens == {"Bearer hf_of_file"}


def test_nothing_goes_anywhere_unasked(hub: Hub, small: Path, tmp_path: Path) -> None:
    publish(RunContext(load_run(str(small)), tmp_path, {}))
    publish(RunContext(config_of(small, hub="me/coders"), tmp_path, {}))  # nothing is trained yet
    write_json(tmp_path / ".stages" / "train.json", {"schema": 1, "key": "of another config"})
    publish(RunContext(config_of(small, hub="me/coders"), tmp_path, {"train": "of this one"}))
    assert hub.pushed == {}
    assert hub.tokens == set()


def test_a_sweep_is_not_pushed(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("over: {train.lr: [0.1]}", encoding="utf-8")
    assert main(["train", str(small), "--sweep", str(sweep), "--push-to-hub", "me/coders"]) == 2
    assert "publish: a sweep's coders are not pushed" in capsys.readouterr().err


def test_a_set_goes_up_whole(hub: Hub, tmp_path: Path) -> None:
    """Its card has a row a coder, and it comes back as a set."""
    from unmix.coder.coder_set import CoderSet
    from unmix.coder.config import CoderConfig, ReLU
    from unmix.coder.sparse_coder import SparseCoder

    fields: dict[str, Any] = {"d_in": 8, "n_latents": 16, "activation": ReLU(), "pre_bias": "none"}
    coders = CoderSet(
        {
            f"layer-{i}": SparseCoder(
                CoderConfig(name=f"layer-{i}", reads=(f"in.{i}",), writes=("out",), **fields), seed=i
            ).eval()
            for i in range(2)
        }
    )
    push_to_hub(coders, "me/coders", path_in_repo="clt", token="hf_secret", endpoint=hub.url, figures={"fvu": 0.25})
    card = hub.pushed["README.md"].decode()
    assert "| layer-1 | `in.1` | `out` | 16 | relu |" in card
    assert 'unmix.load_all("hf://me/coders/clt")' in card
    assert "| fvu | 0.25 |" in card
    for name, data in hub.pushed.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)
    back = unmix.load_all(tmp_path / "back" / "clt")
    assert isinstance(back, CoderSet)
    assert [c.hash() for c in back.values()] == [c.hash() for c in coders.values()]
    with pytest.raises(FormatError, match="are pushed in the native format, not as sae_lens"):
        push_to_hub(coders, "me/coders", format="sae_lens")
