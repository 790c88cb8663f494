"""From stored activations to the latent index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from unmix.coder.codes import Codes
from unmix.index.build import IndexBatch, build_index
from unmix.run.context import RunContext
from unmix.train.store import CHUNK, ActivationStore

ENCODED_AT_ONCE = 16
"""Contexts encoded in one go: bounds the codes in memory, whatever the chunk."""


def build_run_index(context: RunContext, store: ActivationStore) -> None:
    """Encode every captured context with the run's coder and write the index folder."""
    shards, coder = context.shards, context.coder
    vocab = context.lm.token_strings(range(context.lm.vocab_size))
    meta = {
        "coder_hash": {context.coder_name: coder.hash()},
        "tokens_hash": shards.hash,
        "model": context.lm.fingerprint.model_dump(mode="json"),
        "hook": {context.coder_name: context.hooks[0]},
        "source": shards.source_report.get("name", context.config.data.source),
    }
    build_index(
        context.index_folder,
        encoded(context, store),
        {context.coder_name: coder.n_latents},
        shards.context,
        meta=meta,
        vocab=vocab,
        total_tokens=len(store.contexts) * shards.context,
        budget_bytes=context.config.index.budget,
    )


@torch.no_grad()
def encoded(context: RunContext, store: ActivationStore) -> Iterator[IndexBatch]:
    """Batches of tokens, roles, documents, mask and codes, in the store's order."""
    shards, coder = context.shards, context.coder
    for i in range(store.n_chunks):
        acts = store.chunk(i)[context.hooks[0]]
        ids = store.contexts[i * CHUNK : (i + 1) * CHUNK]
        for start in range(0, len(ids), ENCODED_AT_ONCE):
            part = ids[start : start + ENCODED_AT_ONCE]
            codes: Codes = coder.encode(acts[start : start + ENCODED_AT_ONCE].float())
            yield IndexBatch(
                tokens=np.asarray(shards.tokens(part)),
                roles=np.asarray(shards.roles[part]),
                documents=np.asarray(shards.documents(part)),
                mask=np.asarray(shards.mask(part)),
                codes={context.coder_name: codes},
            )
