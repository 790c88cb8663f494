"""A stand-in hub with one native coder and some foreign files, and caches of the test's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from formats.sources.standin import Hub, running
from unmix.coder.config import CoderConfig, ReLU
from unmix.coder.sparse_coder import SparseCoder


def small_coder() -> SparseCoder:
    return SparseCoder(CoderConfig(reads=("a",), d_in=4, n_latents=6, activation=ReLU()), seed=5).eval()


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("UNMIX_CACHE", str(tmp_path / "unmix-cache"))
    monkeypatch.delenv("UNMIX_RELEASES", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # clients wait long before they give up


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    root = tmp_path / "repo"
    small_coder().save(root / "layer_1" / "wide")
    (root / "layer_1" / "wide" / "weights.bin").write_bytes(b"huge")
    (root / "layer_1" / "wide" / "deeper").mkdir()
    (root / "layer_1" / "narrow").mkdir()
    (root / "README.md").write_text("hello")
    with running(Hub(root)) as server:
        # What HF_ENDPOINT sets when the package is imported.
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
