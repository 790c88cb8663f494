"""Training rows out of an activation store: unmasked positions in a resumable order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unmix.core.errors import DataError
from unmix.data.order import Order
from unmix.data.shards import ROLES, TokenShards
from unmix.train.prefetch import Ahead
from unmix.train.store import CHUNK, ActivationStore, chunk_rows
from unmix.train.timing import Clock

BLOCK = 65536
"""Rows inside which training shuffles; contexts are permuted over the whole data before that."""
BATCHES_AHEAD = 2
"""Batches put together while a step is taken, with `ahead`."""


class RowStream:
    """Rows of one role at several hooks of one store, addressed by step alone: one forward pass serves every hook."""

    def __init__(
        self,
        store: ActivationStore,
        shards: TokenShards,
        hooks: Sequence[str],
        seed: int,
        role: str = "train",
        *,
        ahead: bool = False,
        draws: int | None = None,
        stride: int = 1,
        clock: Clock | None = None,
    ) -> None:
        """With `ahead`, a thread makes the next chunks and another puts the next batches together.

        `draws`: rows that will be taken in all, so that nothing is made for afterwards. `stride`: steps from one batch
        to the next that is asked for, where other processes take those between. `clock` counts the waiting.
        `DataError` where the role has no position that counts.
        """
        self.store, self.hooks, self._clock = store, tuple(dict.fromkeys(hooks)), clock or Clock()
        wanted = shards.roles[store.contexts] == ROLES.index(role)
        mask = np.concatenate([shards.mask(part) for part in _parts(store.contexts)])
        self._rows = np.flatnonzero((mask & wanted[:, None]).reshape(-1))
        if len(self._rows) == 0:
            raise DataError(f"no unmasked position has the role {role!r}: take more text or another policy")
        self._context, self._draws, self._stride = shards.context, draws, stride
        self._chunk_rows = CHUNK * shards.context
        self._order = Order(seed, len(self._rows), BLOCK)
        self._kept = _chunks_at_hand(self._rows // self._chunk_rows)
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._last: tuple[tuple[int, int], dict[str, Tensor]] | None = None
        self._chunks = Ahead(store.chunk, 3 * self._kept // 2, "unmix-chunks") if ahead else None
        self._batches = Ahead(self._gather, BATCHES_AHEAD + 1, "unmix-batches") if ahead else None
        self.hash = f"{store.hash}-{role}-{seed}"

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return len(self._rows)

    def batch(self, step: int, size: int) -> dict[str, Tensor]:
        """`{hook: [size, d]}` of a step, float32. The last batch is at hand for coders that share it."""
        if self._last is None or self._last[0] != (step, size):
            with self._clock.on("wait"):
                self._last = (step, size), self._made(step, size)
        return self._last[1]

    def places(self, step: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Which context and position some rows of a batch come from."""
        found = self._ids(step, size)[np.asarray(rows, dtype=np.int64)]
        slots, positions = np.divmod(found, self._context)
        contexts = self.store.contexts[slots]
        return [
            {"row": int(row), "context": int(context), "position": int(position)}
            for row, context, position in zip(rows, contexts, positions, strict=True)
        ]

    def close(self) -> None:
        """End the threads."""
        for ahead in (self._batches, self._chunks):
            if ahead is not None:
                ahead.close()

    def _made(self, step: int, size: int) -> dict[str, Tensor]:
        if self._batches is None:
            return self._gather((step, size))
        ahead = range(step + self._stride, step + BATCHES_AHEAD * self._stride + 1, self._stride)
        later = [(i, size) for i in ahead if not self._over(i, size)]
        return self._batches.take((step, size), later)

    def _ids(self, step: int, size: int) -> np.ndarray:
        return self._rows[np.asarray(self._order.batch(step, size), dtype=np.int64)]

    def _over(self, step: int, size: int) -> bool:
        return self._draws is not None and (step + 1) * size > self._draws

    def _gather(self, key: tuple[int, int]) -> dict[str, Tensor]:
        step, size = key
        rows = self._ids(step, size)
        chunks = rows // self._chunk_rows
        later = self._later(step, size)
        result: dict[str, Tensor] = {}
        for chunk in np.unique(chunks):
            where = torch.from_numpy(np.flatnonzero(chunks == chunk))
            within = torch.from_numpy(rows[where.numpy()] - chunk * self._chunk_rows)
            tensors = self._chunk(int(chunk), later)
            for hook in self.hooks:
                part = chunk_rows(tensors[hook])[within].float()
                if hook not in result:
                    result[hook] = part.new_empty(size, part.shape[-1])
                result[hook][where] = part
        if not result:
            raise DataError("a batch of no rows was asked for")
        return result

    def _later(self, step: int, size: int) -> list[int]:
        """Chunks that are needed a block from now: a batch touches nearly all of those of its block."""
        there = step + -(-BLOCK // size)
        if self._chunks is None or self._over(there, size):
            return []
        return [int(chunk) for chunk in np.unique(self._ids(there, size) // self._chunk_rows)]

    def _chunk(self, i: int, later: list[int]) -> dict[str, Tensor]:
        if self._chunks is not None:
            return self._chunks.take(i, later)
        if i not in self._open:
            self._open[i] = self.store.chunk(i)
            while len(self._open) > self._kept:
                self._open.popitem(last=False)
        self._open.move_to_end(i)
        return self._open[i]


class RowSource:
    """What a coder reads and writes, as `(input, target)` batches of a stream; several hooks are put side by side."""

    def __init__(
        self,
        store: ActivationStore,
        shards: TokenShards,
        read: str | tuple[str, ...],
        write: str | tuple[str, ...],
        seed: int,
        role: str = "train",
        stream: RowStream | None = None,
    ) -> None:
        """With `stream`, rows come from there: sources of one stream give the same rows. Errors as `RowStream`."""
        self.reads = (read,) if isinstance(read, str) else read
        self.writes = (write,) if isinstance(write, str) else write
        self.stream = stream or RowStream(store, shards, (*self.reads, *self.writes), seed, role)
        self.hash = self.stream.hash

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.stream.n_rows

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """`(input [size, d_in], target [size, d_out])` in float32."""
        parts = self.stream.batch(step, size)
        x = _beside([parts[hook] for hook in self.reads])
        return x, x if self.writes == self.reads else _beside([parts[hook] for hook in self.writes])

    def places(self, step: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Which context and position some rows of a batch come from."""
        return self.stream.places(step, size, rows)


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _chunks_at_hand(chunks: np.ndarray) -> int:
    """Chunks to keep open, given the ascending chunk of every row: a batch may touch all those of two blocks."""
    first = chunks[::BLOCK]
    last = chunks[np.minimum(np.arange(BLOCK - 1, len(chunks) + BLOCK - 1, BLOCK), len(chunks) - 1)]
    return 2 * int((last - first + 1).max())


def _parts(contexts: np.ndarray, size: int = 4096) -> list[np.ndarray]:
    return [contexts[start : start + size] for start in range(0, len(contexts), size)]
