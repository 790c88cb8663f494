"""What is made ahead is what would have been made on demand."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from unmix.data.shards import ROLES, TokenShards
from unmix.train import rows as rows_module
from unmix.train.prefetch import Ahead
from unmix.train.rows import RowSource, RowStream
from unmix.train.timing import Clock, summary

from .toys import make_trainer


class Shards(TokenShards):
    """Contexts of eight positions, the first of each masked; every fifth context is of another role."""

    context = 8

    def __init__(self, n: int = 1200) -> None:
        self.roles = np.where(np.arange(n) % 5 == 4, ROLES.index("score"), ROLES.index("train"))

    def mask(self, ids: np.ndarray) -> np.ndarray:
        return np.tile(np.arange(8) > 0, (len(ids), 1))


class Store:
    """Two hooks whose values say which context and position they are of."""

    hooks = ("a", "b")
    hash = "h"

    def __init__(self, shards: Shards) -> None:
        self.contexts = np.random.default_rng(0).permutation(len(shards.roles))
        self.asked: list[tuple[int, str]] = []
        self.fails = -1

    @property
    def n_chunks(self) -> int:
        return -(-len(self.contexts) // rows_module.CHUNK)

    def chunk(self, i: int) -> dict[str, torch.Tensor]:
        self.asked.append((i, threading.current_thread().name))
        if i == self.fails:
            raise OSError("the cache is gone")
        ids = torch.from_numpy(self.contexts[i * rows_module.CHUNK : (i + 1) * rows_module.CHUNK])
        value = (ids[:, None] * 8 + torch.arange(8)).float()
        return {"a": value[..., None].repeat(1, 1, 2), "b": -value[..., None]}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "CHUNK", 64)
    monkeypatch.setattr(rows_module, "BLOCK", 700)


def test_rows_made_ahead_are_those_made_on_demand() -> None:
    """In order, from any step, over several epochs; every chunk comes from one thread."""
    shards = Shards()
    store = Store(shards)
    plain = RowStream(store, shards, ("a", "b"), 3)
    for first in (0, 37):
        other = Store(shards)
        ahead = RowStream(other, shards, ("a", "b"), 3, ahead=True, draws=90 * 100)
        for step in range(first, 90):
            one, two = plain.batch(step, 100), ahead.batch(step, 100)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[hook], two[hook]) for hook in one)
        ahead.close()
        assert {name for _, name in other.asked} == {"unmix-chunks_0"}
    assert ahead.hash == plain.hash


def test_a_chunk_is_made_once_a_block() -> None:
    """Looking ahead makes no chunk twice for the same block: hardly more calls than without."""
    shards = Shards()
    on_demand, foreseen = Store(shards), Store(shards)
    plain = RowStream(on_demand, shards, ("a",), 3)
    ahead = RowStream(foreseen, shards, ("a",), 3, ahead=True, draws=6700)
    for step in range(67):
        plain.batch(step, 100)
        ahead.batch(step, 100)
    ahead.close()
    assert len(foreseen.asked) <= len(on_demand.asked) + 1


def test_nothing_is_made_for_after_the_end() -> None:
    shards = Shards()
    store = Store(shards)
    stream = RowStream(store, shards, ("a",), 3, ahead=True, draws=300)
    for step in range(3):
        stream.batch(step, 100)
    stream.close()
    needed = set(stream._rows[stream._order.range(0, 300)] // (64 * 8))
    assert {i for i, _ in store.asked} == needed


def test_what_fails_behind_is_raised_where_it_is_needed() -> None:
    shards = Shards()
    store = Store(shards)
    store.fails = 3
    stream = RowStream(store, shards, ("a",), 3, ahead=True)
    with pytest.raises(OSError, match="the cache is gone"):
        for step in range(60):
            stream.batch(step, 100)
    store.fails = -1
    stream.batch(0, 100)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("unmix-")]


def test_rows_know_their_context_and_position() -> None:
    shards = Shards()
    stream = RowStream(Store(shards), shards, ("a",), 3)
    batch = stream.batch(5, 100)["a"]
    for place in stream.places(5, 100, [0, 7, 99]):
        assert float(batch[place["row"], 0]) == place["context"] * 8 + place["position"]
        assert place["context"] % 5 != 4
        assert place["position"] > 0


def test_sources_of_one_stream_share_its_batches() -> None:
    shards = Shards()
    stream = RowStream(Store(shards), shards, ("a", "b"), 3)
    sources = [RowSource(stream.store, shards, *pair, 3, stream=stream) for pair in (("a", "a"), ("a", "b"))]
    (x, same), (again, y) = (source.batch(2, 50) for source in sources)
    assert x is same
    assert x is again
    assert torch.equal(y[:, 0], -x[:, 0])
    both = RowSource(stream.store, shards, ("a", "b"), ("a", "b"), 3, stream=stream)
    assert torch.equal(both.batch(2, 50)[0], torch.cat([x, y], -1))


def test_only_what_is_kept_is_held() -> None:
    """The last few results, and those that are wanted now."""
    made: list[int] = []
    ahead: Ahead[int, int] = Ahead(lambda key: made.append(key) or key * key, 2, "unmix-test")
    assert [ahead.take(i, [i + 1]) for i in range(5)] == [0, 1, 4, 9, 16]
    assert ahead.take(0) == 0
    ahead.close()
    assert [key for key in made if key != 5] == [0, 1, 2, 3, 4, 0]


def test_time_counts_once_and_threads_apart() -> None:
    """What is spent inside something else counts there alone; another thread's is kept apart."""
    clock = Clock()

    def behind() -> None:
        with clock.on("model"):
            time.sleep(0.02)

    thread = threading.Thread(target=behind)
    thread.start()
    began = time.perf_counter()
    with clock.on("coder"):
        time.sleep(0.02)
        with clock.on("wait"), clock.on("model"):
            time.sleep(0.03)
    spent = time.perf_counter() - began
    thread.join()
    seconds = clock.seconds()
    assert seconds["model"] >= 0.03
    assert seconds["model (behind)"] >= 0.02
    assert seconds["coder"] + seconds["wait"] + seconds["model"] == pytest.approx(spent, rel=0.05)
    line = summary(10.0, {"coder": 6.0, "wait": 2.0, "save": 1.0, "model (behind)": 4.0})
    assert line == (
        "10.0 s: waiting for data 20%, coder steps 60%, log and checkpoints 10%, the rest 10%; "
        "meanwhile the model ran 4.0 s"
    )


def test_what_came_before_a_loop_is_not_part_of_it() -> None:
    """Rows for the first weights are waited for too."""
    clock = Clock()
    clock.add("wait", 3.0)
    clock.reset()
    clock.add("coder", 1.0)
    assert clock.seconds() == {"coder": 1.0}


def test_the_trainer_says_where_its_time_went(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line at the end."""
    monkeypatch.setattr(logging.getLogger("unmix"), "propagate", True)
    with caplog.at_level(logging.INFO, "unmix"):
        make_trainer(tmp_path).run()
    assert "coder steps" in caplog.text
