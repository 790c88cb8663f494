"""The activations that a run captured, encoded by its coders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.sparse_coder import SparseCoder
from unmix.data.config import ROLES
from unmix.data.shards import TokenShards
from unmix.index.batch import IndexBatch
from unmix.index.sources.live import batch_of, read
from unmix.index.sources.slicing import Slicings
from unmix.train.store import CHUNK, ActivationStore

AT_ONCE = 16
"""Contexts encoded in one go: bounds the codes in memory, whatever the chunk."""


class StoreSource:
    """Contexts in the order of an activation store. The same bytes from a cache and from the model behind it."""

    roles: tuple[str, ...] = ROLES

    def __init__(
        self,
        store: ActivationStore,
        shards: TokenShards,
        coders: Mapping[str, SparseCoder],
        vocab: list[str],
        meta: Mapping[str, Any],
    ) -> None:
        """`meta`: what the index keeps."""
        self.store, self.shards, self.coders = store, shards, dict(coders)
        self.slicings = Slicings.of(shards)
        self._vocab, self._meta = vocab, dict(meta)
        self._inputs = {
            "activations": store.hash,
            "coders": {name: coder.hash() for name, coder in self.coders.items()},
            "tokens": shards.hash,
        }

    @property
    def latents(self) -> dict[str, int]:
        """Number of latents of each coder."""
        return {name: coder.n_latents for name, coder in self.coders.items()}

    @property
    def context(self) -> int:
        """Tokens in a context."""
        return self.shards.context

    @property
    def n_contexts(self) -> int:
        """Captured contexts."""
        return len(self.store.contexts)

    @property
    def vocab(self) -> list[str] | None:
        """Display strings."""
        return self._vocab

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids."""
        return len(self._vocab)

    @property
    def slices(self) -> dict[str, tuple[str, ...]]:
        """`speaker` and `label`, where the tokens have them."""
        return self.slicings.values

    @property
    def meta(self) -> dict[str, Any]:
        """What the index keeps."""
        return self._meta

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the bytes; the hash of the activations covers model, hooks, text and policy."""
        return self._inputs

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        """Slots [first, last) of the store, encoded; parts are cut at multiples of `AT_ONCE`, which divides a chunk."""
        for i in range(first // CHUNK, -(-last // CHUNK)):
            chunk = self.store.chunk(i)
            begin, end = max(first - i * CHUNK, 0), min(last - i * CHUNK, CHUNK)
            for start in range(begin - begin % AT_ONCE, end, AT_ONCE):
                part = {hook: values[start : start + AT_ONCE] for hook, values in chunk.items()}
                ids = self.store.contexts[i * CHUNK + start : i * CHUNK + start + AT_ONCE]
                yield batch_of(
                    self.slicings, ids, self._encode(part), (max(begin - start, 0), min(end - start, len(ids)))
                )

    @torch.no_grad()
    def _encode(self, part: Mapping[str, Tensor]) -> dict[str, Codes]:
        return {name: coder.encode(read(part, coder.config.reads)) for name, coder in self.coders.items()}
