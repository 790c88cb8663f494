"""A tiny random model, packed text, and coders of many architectures on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.config import build
from unmix.core.policy import InputPolicy
from unmix.data.config import ChatConfig, DataConfig
from unmix.data.shards import TokenShards
from unmix.data.tokenise import tokenise
from unmix.index.batch import IndexBatch
from unmix.lm import LanguageModel

POLICY = InputPolicy(bos="context", bos_id=1, separator_id=0)
WIDTH = 32

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"activation": {"kind": "topk", "k": 4}, "reads": ("blocks.1.resid_post",)},
    "batchtopk": {"activation": {"kind": "batchtopk", "k": 4}, "reads": ("blocks.0.resid_post",)},
    "jumprelu": {"activation": {"kind": "jumprelu"}, "reads": ("blocks.1.mlp_out",)},
    "relu": {
        "activation": {"kind": "relu"}, "reads": ("blocks.1.resid_pre",), "normalise": {"kind": "layer_norm"},
    },
    "gated": {"activation": {"kind": "gated"}, "reads": ("blocks.2.attn_out",)},
    "crosscoder": {
        "activation": {"kind": "topk", "k": 4}, "reads": ("blocks.0.resid_post", "blocks.2.resid_post"),
        "d_in": 2 * WIDTH,
    },
    "transcoder": {
        "activation": {"kind": "topk", "k": 4}, "reads": ("blocks.1.mlp_in",), "writes": ("blocks.1.mlp_out",),
        "pre_bias": "none", "skip": True,
    },
    "pursuit": {
        "activation": {"kind": "matching_pursuit", "max_iterations": 3}, "reads": ("blocks.1.resid_post",),
        "pre_bias": "own",
    },
    "temporal": {
        "activation": {"kind": "temporal", "k": 4, "n_heads": 2, "bottleneck": 4, "z_scale": 1.0},
        "reads": ("blocks.1.resid_post",),
    },
}  # fmt: skip
"""Every architecture that reads a model."""


def coder(kind: str, seed: int = 0, **changes: Any) -> SparseCoder:
    """A coder with random weights."""
    tree = {"name": kind, "d_in": WIDTH, "n_latents": 48, "input_policy": POLICY.model_dump(), **KINDS[kind], **changes}
    made = SparseCoder(build(CoderConfig, tree), seed=seed).eval()
    with torch.no_grad():
        made.b_enc.add_(0.05 * torch.randn(made.b_enc.shape, generator=torch.Generator().manual_seed(seed)))
        if kind == "batchtopk":
            made.get_parameter("threshold").fill_(0.5)
    return made


def model(folder: Path) -> LanguageModel:
    """The model of `tiny_model_folder`."""
    from unmix.lm import load_model

    return load_model(str(folder), dtype="float32")


def packed(lm: LanguageModel, source: Path, folder: Path, **changes: Any) -> TokenShards:
    """Packed text (or chats, with `chat`)."""
    tree = {
        "source": str(source), "tokens": 1600, "context": 16, "roles": {"explain": 0.5, "score": 0.5},
        "policy": POLICY.model_dump(), **changes,
    }  # fmt: skip
    return tokenise(build(ChatConfig if "chat" in tree else DataConfig, tree), lm.tokenizer, folder, progress=False)


def joined(batches: Any) -> dict[str, np.ndarray]:
    """Everything that batches hold, end to end, as comparable arrays."""
    found: list[IndexBatch] = list(batches)
    result = {
        name: np.concatenate([getattr(batch, name) for batch in found])
        for name in ("tokens", "roles", "documents", "mask")
    }
    for name in found[0].slices:
        result[f"slice {name}"] = np.concatenate([batch.slices[name] for batch in found])
    for name in found[0].codes:
        codes = [batch.codes[name] for batch in found]
        result[f"{name} values"] = np.concatenate([np.asarray(c.values) for c in codes])
        result[f"{name} indices"] = np.concatenate([np.asarray(c.indices) for c in codes])
        result[f"{name} lengths"] = np.concatenate([np.diff(np.asarray(c.offsets)) for c in codes])
    return result


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether two are equal to the bit."""
    return one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)
