"""A fresh transformer in one of transformers' own families, so that every tool can read the result."""

from __future__ import annotations

from typing import Any

import torch

from unmix.core.seeds import derive
from unmix.train.language.config import LanguageConfig


def fresh_model(config: LanguageConfig, tokenizer: Any) -> Any:
    """The model with first weights drawn from the seed alone, float32, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "weights"))
        model = _gpt2(config, tokenizer) if config.model.family == "gpt2" else _llama(config, tokenizer)
    return model.float()


def _gpt2(config: LanguageConfig, tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = config.model
    found = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=config.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.inner,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    return GPT2LMHeadModel(found)


def _llama(config: LanguageConfig, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model
    found = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=config.context,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        intermediate_size=shape.inner,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    return LlamaForCausalLM(found)
