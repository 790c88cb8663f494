"""Transcoders with random weights on tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lm.fakes import EVERYWHERE
from lm.families import raw_model
from unmix.coder.coder_set import CoderSet
from unmix.coder.config import Activation, CoderConfig, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.lm.model import LanguageModel

LATENTS = 24


def transcoder(
    layer: int, width: int = 16, read: str = "mlp_in", write: str = "mlp_out", activation: Activation | None = None,
    **config: Any,
) -> SparseCoder:  # fmt: skip
    """One layer's, named `l{layer}`."""
    made = CoderConfig(
        name=f"l{layer}", reads=(f"blocks.{layer}.{read}",), writes=(f"blocks.{layer}.{write}",), d_in=width,
        d_out=width, n_latents=LATENTS, activation=activation or TopK(k=4),
        **{"pre_bias": "none", "input_policy": EVERYWHERE, **config},
    )  # fmt: skip
    coder = SparseCoder(made, seed=layer).eval().requires_grad_(False)
    if config.get("skip"):
        coder.W_skip.copy_(torch.randn(width, width, generator=torch.Generator().manual_seed(layer)) / 4)
    return coder


def cross_layer(n_layers: int = 3, width: int = 16) -> CoderSet:
    """A cross-layer transcoder: each layer's coder writes to its own MLP and to all after it."""
    coders: dict[str, SparseCoder] = {}
    for layer in range(n_layers):
        writes = tuple(f"blocks.{later}.mlp_out" for later in range(layer, n_layers))
        config = CoderConfig(
            name=f"l{layer}", reads=(f"blocks.{layer}.mlp_in",), writes=writes, d_in=width, d_out=width * len(writes),
            n_latents=LATENTS, activation=TopK(k=4), pre_bias="none", input_policy=EVERYWHERE,
        )  # fmt: skip
        coders[f"l{layer}"] = SparseCoder(config, seed=layer).eval().requires_grad_(False)
    return CoderSet(coders)


def without_biases(family: str, **changes: Any) -> LanguageModel:
    """A tiny model whose every constant is 0, so that nodes alone add up to every value."""
    model = raw_model(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return LanguageModel(model.requires_grad_(False), f"plain-{family}")


def linear_model() -> LanguageModel:
    """A llama whose norms do nothing and whose attention looks everywhere alike: linear but for its MLPs."""
    model = raw_model("llama")
    for block in model.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        block.self_attn.q_proj.weight.data.zero_()
    model.model.norm = nn.Identity()
    return LanguageModel(model.requires_grad_(False), "linear")
