"""Shares of a batch: side by side they are the batch, read ahead or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from train.test_prefetch import Shards, Store
from unmix.train.feeds import RowFeed
from unmix.train.learner import Learner
from unmix.train.objectives import Step
from unmix.train.parallel.trainer import ShareFeed
from unmix.train.rows import RowStream
from unmix.train.source import TensorSource

from .threads import ThreadMesh


class Rows(RowFeed):
    """A feed that hands out the rows themselves."""

    taken: Tensor

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """Keeps what was asked for."""
        self.taken = self.source.batch(index, size)[0]
        return iter(())


@pytest.mark.parametrize("data", [1, 2, 4])
def test_shares_side_by_side_are_the_batch(data: int) -> None:
    """Ranks of one row take the same; over several epochs and blocks."""
    source = TensorSource(torch.arange(90.0)[:, None], seed=5, block=32)
    for step in range(20):
        shares: list[Tensor] = []
        for rank in range(2 * data):
            feed = Rows(source)
            share = ShareFeed(feed, ThreadMesh(rank, data, 2))
            assert share.n_rows == 90
            list(share.steps(step, 16, {}))
            shares.append(feed.taken)
        assert all(torch.equal(one, two) for one, two in zip(shares[::2], shares[1::2], strict=True))
        assert torch.equal(torch.cat(shares[::2]), source.batch(step, 16)[0])


def test_a_stream_reads_ahead_for_its_own_share_alone() -> None:
    """Every third batch, to the end: the same rows, and no batch made that others take."""
    shards = Shards()
    plain = RowStream(Store(shards), shards, ("a",), 3)
    stream = RowStream(Store(shards), shards, ("a",), 3, ahead=True, draws=60 * 30, stride=3)
    made: list[tuple[int, int]] = []
    inner = stream._gather
    assert stream._batches is not None
    stream._batches._make = lambda key: (made.append(key), inner(key))[1]
    for step in range(1, 60, 3):
        assert torch.equal(stream.batch(step, 30)["a"], plain.batch(step, 30)["a"])
    stream.close()
    assert made == [(step, 30) for step in range(1, 60, 3)]
