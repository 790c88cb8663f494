"""The store over several segments: whatever was cut and whichever blocks are read, the answers are the plain ones."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.postings import Row, as_part, make_rows, make_store, strongest, within
from unmix.index import reading
from unmix.index.store import PostingStore

CONTEXT = 16
SHARES = st.lists(st.sampled_from([0.0, 0.0005, 0.01, 0.1, 0.5, 1.0]), min_size=1, max_size=5)


def rows_of(opened: PostingStore) -> list[Row]:
    return [opened.read(i) for i in range(opened.n_latents)]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shares=SHARES,
    lengths=st.lists(st.integers(0, 90).map(lambda n: CONTEXT * n), min_size=1, max_size=6),
    data=st.data(),
)
def test_the_same_answers_however_it_was_cut(
    seed: int, shares: list[float], lengths: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    rows = make_rows(seed, sum(lengths), shares)
    one = make_store(folder / "one", rows, [sum(lengths)], CONTEXT)
    many = make_store(folder / "many", rows, lengths, CONTEXT)
    stored = rows_of(one)
    for (positions, values), (read, approximate) in zip(rows, stored, strict=True):
        np.testing.assert_array_equal(read, positions)
        np.testing.assert_allclose(approximate, values, rtol=2**-10, atol=2.0**-38 * np.abs(values).max(initial=0))
    counts = [len(positions) for positions, _ in rows]
    for opened in (one, many):
        assert opened.counts.tolist() == counts == [opened.count(i) for i in range(len(rows))]
        np.testing.assert_array_equal(opened.scale, [np.abs(v).max(initial=0) for _, v in rows])
        first = data.draw(st.integers(0, len(rows)))
        last = data.draw(st.integers(first, len(rows)))
        part = opened.part(first, last)
        right = as_part(stored[first:last])
        for array, expected in zip(astuple(part), astuple(right), strict=True):
            np.testing.assert_array_equal(array, expected)
        ids = st.sets(st.integers(0, max(sum(lengths) // CONTEXT - 1, 0)), max_size=20)
        contexts = np.array(sorted(data.draw(ids)), np.int64)
        at_least = data.draw(st.integers(0, 60))
        for i, row in enumerate(stored):
            for found, right in (
                (opened.read(i), row),
                (opened.within(i, contexts), within(row, contexts, CONTEXT)),
                (opened.strongest(i, at_least), strongest(row, at_least)),
            ):
                for array, expected in zip(found, right, strict=True):
                    np.testing.assert_array_equal(array, expected)
                    assert array.dtype == expected.dtype


@pytest.fixture
def dense(tmp_path: Path) -> PostingStore:
    rng = np.random.default_rng(0)
    tokens = 400 * 16 * CONTEXT
    positions = np.arange(0, tokens, 2)
    values = rng.lognormal(0, 1, len(positions)).astype(np.float32)
    return make_store(tmp_path, [(positions, values)], [tokens // 4] * 4, CONTEXT)


def test_few_blocks_of_a_dense_latent_are_decoded(dense: PostingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 × 16 contexts of 8 firings: 16 contexts a block, 400 blocks."""
    decoded: list[int] = []
    plain = reading.decode

    def counting(firsts: np.ndarray, widths: np.ndarray, sizes: np.ndarray, data: np.ndarray) -> object:
        decoded.append(len(firsts))
        return plain(firsts, widths, sizes, data)

    everything = dense.read(0)
    monkeypatch.setattr(reading, "decode", counting)
    few = dense.strongest(0, 5)
    assert decoded == [5] and len(few[0]) == 5
    contexts = np.array([0, 1, 15, 16, 1599, 1600, 6399])
    found = dense.within(0, contexts)
    assert decoded == [5, 5]
    right = (*strongest(everything, 5), *within(everything, contexts, CONTEXT))
    for array, expected in zip((*few, *found), right, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert len(dense.within(0, np.empty(0, np.int64))[0]) == 0
    assert decoded == [5, 5]


def test_shared_arrays_cannot_be_written(dense: PostingStore) -> None:
    for array in (dense.counts, dense.scale):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
