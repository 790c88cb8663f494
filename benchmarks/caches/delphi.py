"""delphi: its cache, filled and saved, and its loader."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.caches.common import BATCH, CONTEXT, HOOK, SPLITS, each, load


def _delphi() -> Any:
    """Its modules. faiss and sentence_transformers serve one kind of negatives that is not asked for here."""
    for absent in ("faiss", "sentence_transformers"):
        try:
            __import__(absent)
        except ImportError:
            module = types.ModuleType(absent)
            module.SentenceTransformer = object  # pyright: ignore[reportAttributeAccessIssue]
            sys.modules[absent] = module
    import delphi.config
    import delphi.latents

    return delphi


def build_delphi(folder: Path, out: Path, latents: int) -> dict[str, Any]:
    """Seconds that `LatentCache` takes to keep dense latents batch by batch and to save its splits."""
    import torch

    delphi = _delphi()
    ids, values, tokens, _ = load(folder, latents)
    cache = delphi.latents.LatentCache(None, {HOOK: None}, batch_size=BATCH)
    cache.width = latents
    spent = 0.0
    for number, start in enumerate(range(0, len(tokens), BATCH)):
        rows = torch.from_numpy(np.array(tokens[start : start + BATCH]))
        cut = slice(start * CONTEXT, (start + len(rows)) * CONTEXT)
        dense = torch.zeros(len(rows) * CONTEXT, latents)
        dense.scatter_(1, torch.from_numpy(np.array(ids[cut])).long(), torch.from_numpy(np.array(values[cut])))
        begun = time.perf_counter()
        cache.cache.add(dense.view(len(rows), CONTEXT, latents), rows, number, HOOK)
        spent += time.perf_counter() - begun
    begun = time.perf_counter()
    cache.cache.save()
    cache.save_splits(SPLITS, out)
    config = delphi.config.CacheConfig(batch_size=BATCH, cache_ctx_len=CONTEXT, n_splits=SPLITS)
    cache.save_config(out, config, "made-up")
    return {"seconds": spent + time.perf_counter() - begun}


class _Tokenizer:
    """As much of a tokenizer as delphi's constructor asks for."""

    pad_token_id = 0

    def batch_decode(self, tokens: Any, **_: Any) -> list[str]:
        return (
            [str(int(token)) for token in tokens.reshape(-1)] if hasattr(tokens, "reshape") else list(map(str, tokens))
        )

    def decode(self, tokens: Any, **_: Any) -> str:
        return " ".join(self.batch_decode(tokens))


def show_delphi(out: Path, chosen: list[int]) -> dict[str, Any]:
    """Milliseconds for each latent asked for by itself, and in its loop over all of them."""
    import torch

    delphi = _delphi()
    settings = delphi.config.SamplerConfig(), delphi.config.ConstructorConfig(min_examples=1)

    def records(latents: Any) -> Any:
        return delphi.latents.LatentDataset(out, *settings, tokenizer=_Tokenizer(), modules=[HOOK], latents=latents)

    def show(latent: int) -> int:
        return sum(len(r.train) + len(r.test) + len(r.not_active) for r in records({HOOK: torch.tensor([latent])}))

    alone = each(show, chosen)
    begun, n = time.perf_counter(), 0
    for _ in records(None):
        n += 1
        if time.perf_counter() - begun > 60:
            break
    return {"ms": alone, "bulk_ms": 1000 * (time.perf_counter() - begun) / max(n, 1), "bulk_latents": n}
