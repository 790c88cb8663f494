"""A tiny model and text for the sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmix.data.shards import TokenShards
from unmix.lm import LanguageModel

from .tiny import model, packed


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, width 32, the tiny tokenizer; random weights from a fixed seed."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=256, bos_token_id=1, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return folder


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
