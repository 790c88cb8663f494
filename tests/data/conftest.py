from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmix.data.config import DataConfig
from unmix.data.sources.base import Document


class Letters:
    """A tokenizer that tests can reckon with: a letter is its place in the alphabet plus 2, anything else is 2."""

    bos_token_id = 0
    eos_token_id = 1
    vocab_size = 30

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        assert add_special_tokens is False
        rows = [[max(ord(c) - ord("a") + 3, 2) if c.isalpha() else 2 for c in text] for text in texts]
        return {"input_ids": rows}


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes texts as JSON Lines; gives a config that reads them."""

    def write(texts: list[str], **fields: Any) -> DataConfig:
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text, "title": f"t{i}"}) + "\n" for i, text in enumerate(texts)))
        return DataConfig(source=str(path), label_column="title", **fields)

    return write


@pytest.fixture
def documents() -> list[Document]:
    return [Document("abc", "s:1", "one"), Document("defgh", "s:2", None), Document("ij", "s:3", "drei")]
