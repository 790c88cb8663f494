"""Tiny random models of many families, float32, built from configs: nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

from unmix.lm import LanguageModel

_SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
_GPT2 = {
    "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OPT = {
    "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 64, "word_embed_proj_dim": 16,
}  # fmt: skip
_WIDE = {**_GROUPED, "head_dim": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_SIZES, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _WIDE),
    "gemma": ("GemmaConfig", _WIDE),
    "gemma2": ("Gemma2Config", {**_WIDE, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_WIDE, "sliding_window": 4}),
    "opt": ("OPTConfig", _OPT),
    "opt_350m": ("OPTConfig", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 8}),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "granite": ("GraniteConfig", {**_GROUPED, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "cohere": ("CohereConfig", _GROUPED),
}
PARALLEL = ("gpt_neox", "phi", "cohere")
# Post-norm blocks: the stream after attention is normed before the MLP reads it.
NO_MID = (*PARALLEL, "opt_350m")


def raw_model(family: str, **changes: Any) -> Any:
    """A fresh Hugging Face model of `family`, weights random but not tiny, in eval mode."""
    name, sizes = CONFIGS[family]
    config = getattr(transformers, name)(**{**sizes, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
            else:
                # Norm gains of 1 and biases of 0 would hide which side of a norm a hook is on.
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def tiny(family: str) -> LanguageModel:
    """One shared tiny model of `family`; tests must leave it as it is."""
    return LanguageModel(raw_model(family).requires_grad_(False), f"tiny-{family}")


def some_tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random ids in 3…99 (0 to 2 are padding and specials)."""
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))
