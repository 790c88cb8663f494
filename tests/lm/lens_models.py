"""The tiny models of `families` as TransformerLens holds them, where that package is installed, without a network."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch

from .families import raw_model

OFFICIAL = {
    "gpt2": "gpt2", "gpt_neox": "EleutherAI/pythia-70m", "qwen2": "Qwen/Qwen2-0.5B", "qwen3": "Qwen/Qwen3-0.6B",
    "gemma": "google/gemma-2b", "opt": "facebook/opt-125m", "phi": "microsoft/phi-1",
}  # fmt: skip
"""`HookedTransformer` builds a family only under the name of a model that it knows."""
CHANGES: dict[str, dict[str, Any]] = {"gpt_neox": {"hidden_size": 32}}
"""GPT-NeoX rotates a quarter of each head, which must be an even number there."""


def hf_model(family: str) -> Any:
    """The Hugging Face model that both sides start from."""
    return raw_model(family, **CHANGES.get(family, {})).requires_grad_(False)


def save(family: str, folder: Path) -> Path:
    """The model with a tokenizer of 100 words, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf_model(family).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w0"
    ).save_pretrained(folder)
    return folder


def bridge(family: str, folder: Path, compatibility: bool = False) -> Any:
    """A `TransformerBridge` (3.x and 4.x); `compatibility` folds and centres as `HookedTransformer` does."""
    from transformer_lens.model_bridge import TransformerBridge

    found = TransformerBridge.boot_transformers(str(save(family, folder)), dtype=torch.float32)
    if compatibility:
        found.enable_compatibility_mode()
    return found


def hooked(family: str, folder: Path, processed: bool = False, **options: Any) -> Any:
    """A `HookedTransformer` (to 3.x), by default without folding and centring."""
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer
    from transformers import AutoTokenizer

    model = hf_model(family)
    config = model.config
    config.architectures, config.n_ctx = [type(model).__name__], config.max_position_embeddings
    auto, sizes = loading.AutoConfig, loading.get_pretrained_model_config

    def ours(*args: Any, **kwargs: Any) -> Any:
        """Some families' sizes are written down by name there; here they are those of the tiny model."""
        cfg = sizes(*args, **kwargs)
        cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.d_vocab, cfg.d_vocab_out = 3, config.hidden_size, 4, 100, 100
        cfg.d_head, cfg.n_ctx = getattr(config, "head_dim", None) or config.hidden_size // 4, 64
        cfg.d_mlp = 64 if family == "gpt2" else 32
        return cfg

    loading.AutoConfig = types.SimpleNamespace(from_pretrained=lambda *_, **__: config)
    loading.get_pretrained_model_config = ours
    build = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    try:
        return build(
            OFFICIAL[family], hf_model=model, tokenizer=AutoTokenizer.from_pretrained(str(save(family, folder))),
            dtype=torch.float32, device="cpu", **options,
        )  # fmt: skip
    finally:
        loading.AutoConfig, loading.get_pretrained_model_config = auto, sizes
