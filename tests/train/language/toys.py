"""A language model small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmix.core.config import build
from unmix.train.language.config import LanguageConfig


def language_tree(text: Path, out: Path, **sections: Any) -> dict[str, Any]:
    """Fields of a config that takes a second: ten steps of 512 tokens; `sections` are put over its own."""
    tree: dict[str, Any] = {
        "data": {"source": str(text), "tokens": 12_000, "context": 32},
        "tokenizer": {"vocab_size": 300, "characters": 40_000},
        "model": {"layers": 2, "width": 16, "heads": 2},
        "train": {"steps": 10, "batch": 256, "lr": 1e-2, "log_every": 3, "checkpoint_every": 4},
        "evaluate": {"tokens": 256, "every": 5},
        "sample": {"prompts": ["", "The "], "tokens": 6},
        "out": str(out),
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return tree


def language_config(text: Path, out: Path, **sections: Any) -> LanguageConfig:
    """The same, validated."""
    return build(LanguageConfig, language_tree(text, out, **sections), source="test")
