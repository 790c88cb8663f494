"""Training rows out of an activation store: unmasked positions in a resumable order."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from unmix.core.errors import DataError
from unmix.data.order import Order
from unmix.data.shards import ROLES, TokenShards
from unmix.train.store import CHUNK, ActivationStore, chunk_rows

BLOCK = 65536
"""Rows inside which training shuffles; contexts are permuted over the whole data before that."""


class RowSource:
    """Rows of one role as `(input, target)` batches, addressed by step alone."""

    def __init__(
        self, store: ActivationStore, shards: TokenShards, read: str, write: str, seed: int, role: str = "train"
    ) -> None:
        """`DataError` where the role has no position that counts."""
        self.store, self.read, self.write = store, read, write
        wanted = shards.roles[store.contexts] == ROLES.index(role)
        mask = np.concatenate([shards.mask(part) for part in _parts(store.contexts)])
        self._rows = np.flatnonzero((mask & wanted[:, None]).reshape(-1))
        if len(self._rows) == 0:
            raise DataError(f"no unmasked position has the role {role!r}: take more text or another policy")
        self._chunk_rows = CHUNK * shards.context
        self._order = Order(seed, len(self._rows), BLOCK)
        self._kept = _chunks_at_hand(self._rows // self._chunk_rows)
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self.hash = f"{store.hash}-{role}-{seed}"

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return len(self._rows)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """`(input [size, d_in], target [size, d_out])` in float32."""
        rows = self._rows[np.asarray(self._order.batch(step, size), dtype=np.int64)]
        chunks = rows // self._chunk_rows
        x: Tensor | None = None
        y: Tensor | None = None
        for chunk in np.unique(chunks):
            where = torch.from_numpy(np.flatnonzero(chunks == chunk))
            within = torch.from_numpy(rows[where.numpy()] - chunk * self._chunk_rows)
            tensors = self._chunk(int(chunk))
            part = chunk_rows(tensors[self.read])[within].float()
            x = part.new_empty(size, part.shape[-1]) if x is None else x
            x[where] = part
            if self.write != self.read:
                other = chunk_rows(tensors[self.write])[within].float()
                y = other.new_empty(size, other.shape[-1]) if y is None else y
                y[where] = other
        if x is None:
            raise DataError("a batch of no rows was asked for")
        return x, x if y is None else y

    def _chunk(self, i: int) -> dict[str, Tensor]:
        if i not in self._open:
            self._open[i] = self.store.chunk(i)
            while len(self._open) > self._kept:
                self._open.popitem(last=False)
        self._open.move_to_end(i)
        return self._open[i]


def _chunks_at_hand(chunks: np.ndarray) -> int:
    """Chunks to keep open, given the ascending chunk of every row: a batch may touch all those of two blocks."""
    first = chunks[::BLOCK]
    last = chunks[np.minimum(np.arange(BLOCK - 1, len(chunks) + BLOCK - 1, BLOCK), len(chunks) - 1)]
    return 2 * int((last - first + 1).max())


def _parts(contexts: np.ndarray, size: int = 4096) -> list[np.ndarray]:
    return [contexts[start : start + size] for start in range(0, len(contexts), size)]
