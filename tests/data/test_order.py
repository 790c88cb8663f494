from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmix.core.errors import DataError
from unmix.data.order import Order

orders = st.builds(Order, seed=st.integers(0, 2**40), n_items=st.integers(1, 200), block=st.integers(1, 64))


@settings(max_examples=60, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_each_epoch_visits_each_item_once(order: Order, epoch: int) -> None:
    drawn = order.range(epoch * order.n_items, (epoch + 1) * order.n_items)
    assert np.array_equal(np.sort(drawn), np.arange(order.n_items))


@settings(max_examples=60, deadline=None)
@given(order=orders, batch_size=st.integers(1, 70), step=st.integers(0, 40))
def test_any_step_is_the_same_with_and_without_history(order: Order, batch_size: int, step: int) -> None:
    sequential = order.range(0, (step + 1) * batch_size)
    assert np.array_equal(order.batch(step, batch_size), sequential[step * batch_size :])


@settings(max_examples=40, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_items_come_block_by_block_as_blocks_and_inside_say(order: Order, epoch: int) -> None:
    expected = [order.inside(epoch, block) + block * order.block for block in order.blocks(epoch).tolist()]
    drawn = order.range(epoch * order.n_items, (epoch + 1) * order.n_items)
    assert np.array_equal(drawn, np.concatenate(expected))


def test_seeds_and_epochs_give_other_orders() -> None:
    a, b = Order(0, 1000, 100), Order(1, 1000, 100)
    assert not np.array_equal(a.range(0, 1000), b.range(0, 1000))
    assert not np.array_equal(a.range(0, 1000), a.range(1000, 2000))


def test_the_order_is_pinned() -> None:
    """A resumed run must draw what the stopped one would have, on any machine and any NumPy."""
    assert Order(7, 10, 4).batch(0, 12).tolist() == [5, 7, 4, 6, 2, 3, 1, 0, 8, 9, 2, 0]


def test_every_item_is_equally_likely_in_every_place() -> None:
    """Mean place of each item over many seeds, against the standard error of a uniform place."""
    n, runs = 24, 1500
    places = np.empty((runs, n))
    for seed in range(runs):
        places[seed, Order(seed, n, 8).range(0, n)] = np.arange(n)
    error = np.sqrt((n**2 - 1) / 12 / runs)
    assert np.abs(places.mean(axis=0) - (n - 1) / 2).max() < 4.5 * error
    assert np.abs(places.std(axis=0) / np.sqrt((n**2 - 1) / 12) - 1).max() < 0.1


def test_neighbours_inside_a_block_are_scattered() -> None:
    drawn = Order(3, 4096, 4096).range(0, 4096)
    correlation = np.corrcoef(np.arange(4096), drawn)[0, 1]
    assert abs(correlation) < 4.5 / np.sqrt(4096)
    assert np.abs(np.diff(drawn)).mean() == pytest.approx(4096 / 3, rel=0.05)


def test_a_shorter_last_block_is_not_always_last() -> None:
    first = {int(Order(seed, 10, 4).blocks(0)[0]) for seed in range(30)}
    assert first == {0, 1, 2}


def test_a_permutation_handed_out_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Order(0, 10, 10).inside(0, 0)[0] = 1


def test_bad_sizes_say_so() -> None:
    with pytest.raises(DataError, match="found n_items=0, block=4"):
        Order(0, 0, 4)
    with pytest.raises(DataError, match="found -1 and 4"):
        Order(0, 10, 4).batch(-1, 4)
