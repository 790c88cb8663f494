"""A tiny model and text for the sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmix.data.shards import TokenShards
from unmix.lm import LanguageModel

from .tiny import model, packed


@pytest.fixture(scope="session")
def lm(tiny_model_folder: Path) -> LanguageModel:
    """Loaded once."""
    return model(tiny_model_folder)


@pytest.fixture(scope="session")
def text(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of three classes."""
    path = tmp_path_factory.mktemp("classes") / "text.jsonl"
    rows = [{"text": words[:400], "class": "abc"[i % 3]} for i, words in enumerate(prose)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shards(lm: LanguageModel, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """A hundred contexts."""
    return packed(lm, text, tmp_path_factory.mktemp("packed") / "tokens", label_column="class")
