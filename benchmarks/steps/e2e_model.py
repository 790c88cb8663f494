"""What both end-to-end contestants run on: a small GPT-2-like model and random tokens."""

from __future__ import annotations

from typing import Any

CONTEXT = 128
SIZES = {"layers": 2, "heads": 4}
BATCHES = 8


def tokens(size: int, vocabulary: int) -> Any:
    """`[BATCHES, contexts, CONTEXT]` int64, always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (BATCHES, size // CONTEXT, CONTEXT), generator=generator)
