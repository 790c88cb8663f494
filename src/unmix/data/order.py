"""The order of training items as a function of (seed, step): no history, no shuffle buffer (decision 13)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from unmix.core.errors import DataError
from unmix.core.seeds import derive

Permutation = Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class Order:
    """A keyed permutation of super-blocks, and one inside each, anew in every epoch.

    Items 0 … n_items−1 lie in blocks of `block` neighbours (the last may be shorter). Within an epoch every item comes
    once. The state of a run is its step: `batch(step, size)` reads no other. A block of n items costs n·8 bytes and a
    sort of n numbers, once for as long as the steps stay in it.
    """

    seed: int
    n_items: int
    block: int

    def __post_init__(self) -> None:
        if self.n_items < 1 or self.block < 1:
            raise DataError(f"an order needs items and a block size, found n_items={self.n_items}, block={self.block}")

    @property
    def n_blocks(self) -> int:
        """Blocks in an epoch, the shorter last one included."""
        return -(-self.n_items // self.block)

    def blocks(self, epoch: int) -> Permutation:
        """The order of the blocks in this epoch."""
        return _permutation(derive(self.seed, "blocks", epoch), self.n_blocks)

    def inside(self, epoch: int, block: int) -> Permutation:
        """The order of the items of a block in this epoch, counted from the block's first."""
        return _permutation(derive(self.seed, "inside", epoch, block), self.size(block))

    def size(self, block: int) -> int:
        """Items in a block."""
        return min(self.block, self.n_items - block * self.block)

    def batch(self, step: int, batch_size: int) -> Int64[np.ndarray, " batch"]:
        """The item ids of step `step` when every step takes `batch_size`; it may span blocks and epochs."""
        if step < 0 or batch_size < 1:
            raise DataError(f"a batch needs step ≥ 0 and batch_size ≥ 1, found {step} and {batch_size}")
        return self.range(step * batch_size, (step + 1) * batch_size)

    def range(self, start: int, stop: int) -> Int64[np.ndarray, " batch"]:
        """The item ids from draw `start` to draw `stop`, counted from the beginning of epoch 0."""
        parts: list[np.ndarray] = []
        at = start
        while at < stop:
            epoch, place = divmod(at, self.n_items)
            slot, inside = self._slot(epoch, place)
            block = int(self.blocks(epoch)[slot])
            taken = self.inside(epoch, block)[inside : inside + stop - at]
            parts.append(taken + block * self.block)
            at += len(taken)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _slot(self, epoch: int, place: int) -> tuple[int, int]:
        """`(which block in the epoch's order, which item in it)`; one slot, the shorter block's, is shorter."""
        last = self.n_blocks - 1
        short = int(np.flatnonzero(self.blocks(epoch) == last)[0])
        missing = self.block - self.size(last)
        if place < short * self.block + self.size(last):
            return divmod(place, self.block)
        return divmod(place + missing, self.block)


@lru_cache(maxsize=8)
def _permutation(key: int, size: int) -> Permutation:
    """A uniform permutation of `size` items.

    It sorts Philox's raw 64-bit numbers: NumPy keeps that stream the same in every version, but not what its
    `permutation` makes of it, and a run must resume after an upgrade. Read-only, since it is shared.
    """
    numbers = np.random.Philox(key=key).random_raw(size)
    order = np.argsort(numbers, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
