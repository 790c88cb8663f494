"""The posting codec: whatever goes in comes out, and values do not tell how their postings were cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmix.index import codec, halves
from unmix.index.codec import BLOCK, PADDING, block_bytes, block_counts, block_sizes, decode, encode

COUNTS = st.lists(st.sampled_from([0, 1, 2, 3, 127, 128, 129, 255, 256, 257, 700]), max_size=9)
LARGEST = 2**32 - 1


def ascending(rng: np.random.Generator, count: int, spread: str) -> np.ndarray:
    """`count` different u32, ascending, from consecutive to spread over all of them."""
    if spread == "ends" and count >= 2:
        middle = np.sort(rng.choice(LARGEST - 1, count - 2, replace=False)) + 1
        return np.concatenate([[0], middle, [LARGEST]]).astype(np.uint32)
    span = {"full": 1, "half": 2, "some": 9, "bursts": 1}.get(spread, 9) * count
    places = np.sort(rng.choice(max(span, 1), count, replace=False))
    if spread == "bursts":
        places += np.cumsum(np.where(rng.random(count) < 0.02, rng.integers(0, 10**6, count), 0))
    return (places + rng.integers(0, LARGEST - int(places[-1] if count else 0) + 1)).astype(np.uint32)


def round_trip(positions: np.ndarray, counts: np.ndarray, bases: int = 0) -> codec.Packed:
    sizes = block_sizes(counts)
    packed = encode(positions, sizes)
    assert packed.firsts.dtype == np.uint32 and packed.widths.dtype == packed.data.dtype == np.uint8
    assert len(packed.data) == block_bytes(packed.widths, sizes).sum()
    rubbish = np.full(PADDING, 0xFF, np.uint8)
    read, lasts = decode(
        packed.firsts.astype(np.int64) + bases, packed.widths, sizes, np.concatenate([packed.data, rubbish])
    )
    np.testing.assert_array_equal(read, positions.astype(np.int64) + bases)
    np.testing.assert_array_equal(lasts, read[np.cumsum(sizes) - 1])
    return packed


@settings(max_examples=150, deadline=None)
@given(
    counts=COUNTS,
    seed=st.integers(0, 2**32 - 1),
    spreads=st.lists(st.sampled_from(["full", "half", "some", "bursts", "ends"]), min_size=9, max_size=9),
    base=st.sampled_from([0, 2**32, 2**40 + 3]),
    run=st.sampled_from([1, 128, 300, codec.RUN]),
)
def test_any_rows_come_back(counts: list[int], seed: int, spreads: list[str], base: int, run: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [ascending(rng, count, spread) for count, spread in zip(counts, spreads, strict=False)]
    positions = np.concatenate([*rows, np.empty(0, np.uint32)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "RUN", run)
        packed = round_trip(positions, np.array(counts, np.int64), base)
    np.testing.assert_array_equal(
        packed.firsts, np.concatenate([*(row[::BLOCK] for row in rows), np.empty(0, np.uint32)])
    )


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, LARGEST), max_size=300))
def test_any_set_of_positions_comes_back(found: set[int]) -> None:
    round_trip(np.array(sorted(found), np.uint32), np.array([len(found)]))


@pytest.mark.parametrize("width", range(33))
def test_every_width_at_its_limits(width: int) -> None:
    """All-ones gaps beside all-zeros ones, over more than one word, in a whole and in a short block."""
    widest = 2**width
    gaps = np.ones(BLOCK + 70, np.int64)
    free = (LARGEST - len(gaps)) // widest
    gaps[np.arange(1, len(gaps), 2)[:free]] = widest
    if width == 32:
        gaps = np.array([0, 2**32 - 1])
    positions = np.cumsum(gaps) - gaps[0]
    packed = round_trip(positions.astype(np.uint32), np.array([len(positions)]))
    assert packed.widths[0] == width


def test_what_packing_costs() -> None:
    """Consecutive positions take no bits, single ones no bytes; a gap costs its bits and no more."""
    sizes = block_sizes(np.array([128, 1]))
    assert sizes.tolist() == [128, 1]
    assert len(encode(np.append(np.arange(128), 9).astype(np.uint32), sizes).data) == 0
    one = encode(np.arange(0, 128 * 8, 8, dtype=np.uint32), np.array([128]))
    assert one.widths.tolist() == [3] and len(one.data) == math.ceil(127 * 3 / 8)


def test_blocks_of_rows() -> None:
    counts = np.array([0, 1, 128, 129, 0, 256, 300])
    assert block_counts(counts).tolist() == [0, 1, 1, 2, 0, 2, 3]
    assert block_sizes(counts).tolist() == [1, 128, 128, 1, 128, 128, 128, 128, 44]
    assert block_sizes(np.empty(0, np.int64)).tolist() == []


def plain(value: float, largest: float) -> float:
    """What reading gives for a value of a latent whose strongest has |value| `largest`, one value at a time."""

    def rounded(x: float) -> float:
        mantissa, exponent = math.frexp(abs(x))
        return math.ldexp(round(math.ldexp(mantissa, 11)), exponent - 11)

    if rounded(value) == rounded(largest):
        return math.copysign(largest, value)
    step = math.ldexp(1, math.frexp(largest)[1] - 15 - 24)
    return math.copysign(max(math.floor(rounded(value) / step), 1) * step, value)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool)
NEAR = st.builds(
    lambda scale, ratio: float(np.float32(math.ldexp(scale, 3) * ratio)),
    st.sampled_from([1.0, -1.0, 1e-30, 1e30]),
    st.floats(2.0**-45, 1),
)


@settings(max_examples=400, deadline=None)
@given(values=st.lists(FLOATS | NEAR.filter(bool), min_size=1, max_size=60), data=st.data())
def test_values_do_not_depend_on_how_they_were_cut(values: list[float], data: st.DataObject) -> None:
    array = np.array(values, np.float32)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(values)), max_size=5)))
    counts = np.diff([0, *cuts, len(values)])
    own, all_of_them = halves.maxima(array, counts), np.array([len(array)])
    whole = np.abs(array).max()
    pieces = halves.from_half(halves.to_half(array, counts, own), counts, own, np.full(len(counts), whole, np.float32))
    one = halves.from_half(halves.to_half(array, all_of_them, whole[None]), all_of_them, whole[None], whole[None])
    np.testing.assert_array_equal(pieces, one)
    np.testing.assert_array_equal(one, np.array([plain(v, float(whole)) for v in values], np.float32))
    exact = array.astype(np.float64)
    assert (np.sign(one) == np.sign(array)).all() and np.abs(one).max() == whole
    assert (np.abs(one - exact) <= 2**-10 * np.abs(exact) + 2.0**-38 * float(whole)).all()
    order = np.argsort(np.abs(array), kind="stable")
    assert (np.diff(np.abs(one)[order]) >= 0).all()


def test_precision_by_size() -> None:
    """Eleven bits from the largest value down to 2^-29 of it; then steps of 2^-39 of the power above it."""
    largest = np.float32(1.999)
    values = np.append(largest, np.ldexp(np.float32(1.2345678), -np.arange(60))).astype(np.float32)
    one = np.array([len(values)])
    half = halves.to_half(values, one, largest[None])
    read = halves.from_half(half, one, largest[None], largest[None]).astype(np.float64)
    error = np.abs(read - values) / values
    assert read[0] == largest and error[1:29].max() <= 2**-11
    np.testing.assert_array_equal(read[-10:], 2.0**-38)
    assert halves.strengths(half).max() <= halves.LARGEST


def test_maxima_of_rows_with_empty_ones() -> None:
    values, counts = np.array([-3, 2, 1], np.float32), np.array([0, 2, 0, 1, 0])
    assert halves.maxima(values, counts).tolist() == [0, 3, 0, 1, 0]
    assert halves.maxima(values[:0], np.array([0, 0])).tolist() == [0, 0]
    nothing = halves.from_half(np.empty(0, np.float16), np.empty(0, np.int64), values[:0], values[:0])
    assert nothing.dtype == np.float32 and len(nothing) == 0
