"""A whole run small enough for a test: a tiny random Llama, the interpreter's manual as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document a topic of the interpreter's manual."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    for name, text in sorted(topics.items()):
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run_tree(tiny_model_folder: Path, text_folder: Path) -> dict[str, Any]:
    """Fields of a run that takes seconds."""
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"source": str(text_folder), "tokens": 60_000, "context": 32},
        "coder": {"hook": "layers.1", "n_latents": 96, "k": 8},
        "train": {"epochs": 2, "batch": 512, "init_rows": 1024, "log_every": 5, "checkpoint_every": 10},
        "evaluate": {"tokens": 2048},
        "explain": {"latents": 12},
    }


@pytest.fixture
def run_file(run_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The same as a YAML file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(run_tree), encoding="utf-8")
    return path
