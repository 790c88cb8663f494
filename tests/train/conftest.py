"""Tensors here are tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torch_settings import torch_settings

__all__ = ["torch_settings"]


@pytest.fixture(scope="session")
def model_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, width 16, the tiny tokenizer; random weights from a fixed seed."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "vocab_size": 512}
    GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=0, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return folder
