"""`read_delphi`: a delphi cache → an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unmix.index.build import build_index
from unmix.index.exchange.delphi_reading import DelphiSource
from unmix.index.reader import LatentIndex
from unmix.index.writer import DEFAULT_BUDGET


def read_delphi(
    cache: str | Path,
    folder: str | Path,
    *,
    tokens: np.ndarray | None = None,
    document_token: int | None = None,
    vocab: Sequence[str] | None = None,
    budget_bytes: int = DEFAULT_BUDGET,
) -> LatentIndex:
    """Write an index of a cache, new layout or old, and open it; each hook becomes a coder of its name.

    Arguments and errors as `DelphiSource`. Memory is bounded by `budget_bytes` (and 8 bytes a row and split).
    """
    source = DelphiSource(cache, tokens=tokens, document_token=document_token, vocab=vocab)
    return build_index(
        folder, source.batches(), source.latents, source.context, meta=source.meta,
        vocab=source.vocab, vocab_size=source.vocab_size, roles=source.roles, slices=source.slices,
        total_tokens=source.n_contexts * source.context, budget_bytes=budget_bytes,
    )  # fmt: skip
