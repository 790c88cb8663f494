"""`wandb://` places against a small stand-in for the `wandb` package, put where the import system finds it.

The stand-in has the few calls that are used (`Api().run`, `.artifact`, `File.download`, `Artifact.download`), with the
real package's signatures and the one class of error that it raises for everything.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import pytest

from unmix.core.errors import FormatError, MachineError, ServiceError
from unmix.formats.sources.wandb import fetch, parse


class CommError(Exception):
    pass


class File:
    def __init__(self, name: str, data: bytes, cloud: Cloud) -> None:
        self.name, self.data, self.size, self.cloud = name, data, len(data), cloud

    def download(self, root: str = ".", replace: bool = False, exist_ok: bool = False) -> IO[str]:
        path = Path(root) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data[: len(self.data) // 2] if self.cloud.cut else self.data)
        self.cloud.fetched.append(self.name)
        return path.open()


class Cloud:
    """What W&B holds: runs and artifacts, by their full names."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, bytes]] = {}
        self.artifacts: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.failure = ""
        self.cut = False

    def run(self, path: str) -> Any:
        if self.failure:
            raise CommError(self.failure)
        if path not in self.runs:
            raise CommError(f"Could not find run <Run {path} (not found)>")
        files = [File(name, data, self) for name, data in self.runs[path].items()]
        return SimpleNamespace(id=path.rsplit("/", 1)[1], files=lambda: iter(files))

    def artifact(self, name: str) -> Any:
        if name.replace(":latest", ":v3") not in self.artifacts:
            raise CommError(f"artifact membership '{name}' not found")
        files = self.artifacts[name.replace(":latest", ":v3")]

        def download(root: str, path_prefix: str | None = None, skip_cache: bool | None = None) -> str:
            for key, data in files.items():
                if path_prefix is None or key.startswith(path_prefix):
                    File(key, data, self).download(root).close()
            return root

        return SimpleNamespace(
            version="v3", digest="abc123", manifest=SimpleNamespace(entries=dict.fromkeys(files)), download=download
        )


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    here = Cloud()
    module = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.Api = lambda: here  # type: ignore[attr-defined]
    module.errors = SimpleNamespace(Error=CommError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    here.runs["sparsify/gpt2/tvj2owza"] = {
        "final_config.yaml": b"a: 1", "samples_4000.pt": b"old", "samples_10000.pt": b"newest",
        "wandb-summary.json": b"{}", "config.yaml": b"b: 1", "output.log": b"...",
    }  # fmt: skip
    here.artifacts["me/p/saes:v3"] = {"a/ae.pt": b"a", "a/config.json": b"{}", "b/ae.pt": b"b"}
    return here


def test_parts_of_a_place():
    run = parse("wandb://sparsify/gpt2/runs/tvj2owza/samples_1.pt")
    assert (run.full, run.version, run.path) == ("sparsify/gpt2/tvj2owza", None, "samples_1.pt")
    assert parse("wandb://me/p/saes:v3/a").full == "me/p/saes:v3"
    with pytest.raises(FormatError, match="expected wandb://entity/project/run"):
        parse("wandb://me/p")


def test_the_newest_checkpoint_of_a_run_and_its_config(cloud):
    found = fetch("wandb://sparsify/gpt2/tvj2owza")
    assert found.path.name == "samples_10000.pt" and found.path.read_bytes() == b"newest"
    assert sorted(cloud.fetched) == ["config.yaml", "final_config.yaml", "samples_10000.pt"]
    assert found.origin == {
        "scheme": "wandb", "place": "wandb://sparsify/gpt2/tvj2owza", "repo": "sparsify/gpt2/tvj2owza",
        "revision": "tvj2owza", "path": "",
    }  # fmt: skip
    fetch("wandb://sparsify/gpt2/tvj2owza")
    assert len(cloud.fetched) == 3, "what is here is not fetched again"


def test_a_named_checkpoint(cloud):
    assert fetch("wandb://sparsify/gpt2/tvj2owza/samples_4000.pt").path.read_bytes() == b"old"
    with pytest.raises(FormatError, match=r"no file 'samples_400\.pt'. Did you mean 'samples_4000\.pt'"):
        fetch("wandb://sparsify/gpt2/tvj2owza/samples_400.pt")


def test_every_checkpoint_of_a_run(cloud):
    found = fetch("wandb://sparsify/gpt2/tvj2owza", below=True)
    assert found.path.is_dir() and {p.name for p in found.path.iterdir()} >= {"samples_4000.pt", "samples_10000.pt"}


def test_an_artifact_and_a_folder_of_one(cloud):
    found = fetch("wandb://me/p/saes:latest")
    assert sorted(p.name for p in found.path.iterdir()) == ["a", "b"] and found.origin["revision"] == "v3"
    part = fetch("wandb://me/p/saes:v3/a/ae.pt")
    assert part.path.read_bytes() == b"a" and (part.path.parent / "config.json").is_file()
    with pytest.raises(FormatError, match=r"the artifact has no 'c/ae\.pt'. Did you mean '[ab]/ae\.pt'"):
        fetch("wandb://me/p/saes:v3/c/ae.pt")


@pytest.mark.parametrize("place", ["wandb://sparsify/gpt2/nothere", "wandb://me/p/none:v1"])
def test_what_is_not_there(cloud, place):
    with pytest.raises(FormatError, match=f"no {place.removeprefix('wandb://')} on W&B"):
        fetch(place)


def test_a_run_without_weights(cloud):
    cloud.runs["a/b/c"] = {"output.log": b""}
    with pytest.raises(FormatError, match=r"the run saved no weights; it holds output\.log"):
        fetch("wandb://a/b/c")


def test_refusals_and_outages(cloud):
    cloud.failure = "api_key not configured (no-tty). call wandb.login(key=[your_api_key])"
    with pytest.raises(FormatError, match="log in with `wandb login`"):
        fetch("wandb://sparsify/gpt2/tvj2owza")
    cloud.failure = "Network error (ConnectionError), entering retry loop."
    with pytest.raises(ServiceError, match="W&B does not answer"):
        fetch("wandb://sparsify/gpt2/tvj2owza")


def test_the_cache_serves_when_wandb_does_not(cloud, monkeypatch, caplog):
    first = fetch("wandb://sparsify/gpt2/tvj2owza")
    cloud.failure = "Network error (ConnectionError)"
    assert fetch("wandb://sparsify/gpt2/tvj2owza") == first
    assert "using the copy in the cache" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert fetch("wandb://sparsify/gpt2/tvj2owza") == first
    with pytest.raises(ServiceError, match="not in the cache, and WANDB_MODE is offline"):
        fetch("wandb://me/p/saes:v3")


def test_half_a_file_is_not_kept(cloud, tmp_path):
    cloud.cut = True
    with pytest.raises(ServiceError, match=r"the download broke off at 3 of 6 bytes"):
        fetch("wandb://sparsify/gpt2/tvj2owza")
    assert not [p for p in (tmp_path / "unmix-cache").rglob("*") if p.is_file()]
    cloud.cut = False
    assert fetch("wandb://sparsify/gpt2/tvj2owza").path.read_bytes() == b"newest"


def test_without_the_package(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MachineError, match=r"needs the package 'wandb': pip install 'unmix\[wandb\]'"):
        fetch("wandb://sparsify/gpt2/tvj2owza")
