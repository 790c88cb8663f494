"""From stored activations to the latent index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unmix.coder.sparse_coder import SparseCoder
from unmix.index.build import IndexBatch, build_index
from unmix.run.context import RunContext
from unmix.train.store import CHUNK, ActivationStore

ENCODED_AT_ONCE = 16
"""Contexts encoded in one go: bounds the codes in memory, whatever the chunk."""


def build_run_index(context: RunContext, store: ActivationStore) -> None:
    """Encode every captured context with the run's coders and write the index folder."""
    shards, coders = context.shards, context.coders
    vocab = context.lm.token_strings(range(context.lm.vocab_size))
    meta = {
        "coder_hash": {name: coder.hash() for name, coder in coders.items()},
        "tokens_hash": shards.hash,
        "model": context.lm.fingerprint.model_dump(mode="json"),
        "hook": {name: coder.config.reads[0] for name, coder in coders.items()},
        "source": shards.source_report.get("name", context.config.data.source),
    }
    build_index(
        context.index_folder,
        encoded(context, store),
        {name: coder.n_latents for name, coder in coders.items()},
        shards.context,
        meta=meta,
        vocab=vocab,
        total_tokens=len(store.contexts) * shards.context,
        budget_bytes=context.config.index.budget,
    )


@torch.no_grad()
def encoded(context: RunContext, store: ActivationStore) -> Iterator[IndexBatch]:
    """Batches of tokens, roles, documents, mask and codes, in the store's order."""
    shards, coders = context.shards, context.coders
    for i in range(store.n_chunks):
        chunk = store.chunk(i)
        ids = store.contexts[i * CHUNK : (i + 1) * CHUNK]
        for start in range(0, len(ids), ENCODED_AT_ONCE):
            part = ids[start : start + ENCODED_AT_ONCE]
            cut = slice(start, start + ENCODED_AT_ONCE)
            yield IndexBatch(
                tokens=np.asarray(shards.tokens(part)),
                roles=np.asarray(shards.roles[part]),
                documents=np.asarray(shards.documents(part)),
                mask=np.asarray(shards.mask(part)),
                codes={name: coder.encode(_input(chunk, coder, cut)) for name, coder in coders.items()},
            )


def _input(chunk: dict[str, Tensor], coder: SparseCoder, cut: slice) -> Tensor:
    return torch.cat([chunk[hook][cut].float() for hook in coder.config.reads], dim=-1)
