"""Set operations between latents against NumPy's own, and the windows of what comes out."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import Stream, greedy, make_stream, peaks, rebuilt, write
from index.sliced import Sliced, make_sliced, sliced_streams, write_sliced
from index.test_windows import same, spans
from unmix.core.errors import ConfigError
from unmix.index.reader import LatentIndex
from unmix.index.sets import LatentSet


def fired(index: LatentIndex, latent: int) -> np.ndarray:
    return np.flatnonzero(rebuilt(index, "a", latent))


def check(index: LatentIndex, found: LatentSet, expected: np.ndarray) -> None:
    """Positions, and every operand's value wherever it is given."""
    np.testing.assert_array_equal(found.positions, expected)
    assert found.count == len(found) == len(expected)
    assert found.values.shape == (len(expected), len(found.operands)) and len(set(found.operands)) == len(
        found.operands
    )
    assert ((found.strength > 0) & (found.strength <= 1)).all()
    for column, (coder, latent) in zip(found.values.T, found.operands, strict=True):
        truth = rebuilt(index, coder, latent)[expected]
        given_ = column != 0
        np.testing.assert_array_equal(column[given_], truth[given_])


@settings(max_examples=15, deadline=None)
@given(sliced=sliced_streams, a=st.integers(0, 1), b=st.integers(0, 1), c=st.integers(0, 1))
def test_operations_are_those_of_sets(
    sliced: Sliced, a: int, b: int, c: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = write_sliced(tmp_path_factory.mktemp("index") / "i", sliced)
    A, B, C = (fired(index, i) for i in (a, b, c))
    x, y, z = index[a], index[b], index[c]
    check(index, x & y, np.intersect1d(A, B))
    check(index, x | y, np.union1d(A, B))
    check(index, x - y, np.setdiff1d(A, B))
    check(index, (x & y) | z, np.union1d(np.intersect1d(A, B), C))
    check(index, x - (y | z), np.setdiff1d(A, np.union1d(B, C)))
    check(index, (x - y) | (y - x), np.setxor1d(A, B))
    np.testing.assert_array_equal((x & (y | z)).positions, ((x & y) | (x & z)).positions)
    both = x & y
    for latent in {a, b}:
        column = both.values[:, both.operands.index(("a", latent))]
        np.testing.assert_array_equal(column, rebuilt(index, "a", latent)[both.positions])
    either = x | y
    scale = [np.abs(rebuilt(index, "a", i)) / (index[i].max or 1) for i in (a, b)]
    np.testing.assert_allclose(both.strength, np.minimum(*scale)[both.positions], rtol=1e-6)
    np.testing.assert_allclose(either.strength, np.maximum(*scale)[either.positions], rtol=1e-6)
    np.testing.assert_allclose((x - y).strength, scale[0][(x - y).positions], rtol=1e-6)
    measured = x.overlap(y)
    assert (measured.first, measured.second, measured.both) == (len(A), len(B), len(np.intersect1d(A, B)))
    assert measured.either == len(np.union1d(A, B))
    if len(A) and len(B):
        assert measured.jaccard == len(np.intersect1d(A, B)) / len(np.union1d(A, B))
        assert measured.first_in_second == measured.both / len(A)
        assert measured.second_in_first == measured.both / len(B)
        assert measured.lift == pytest.approx(measured.both * sliced.stream.mask.sum() / (len(A) * len(B)))
    for keep in (
        {"role": "explain"},
        {"where": {"speaker": ["user", "tool"]}},
        {"documents": [int(sliced.stream.documents.max())]},
    ):
        check(index, either.restrict(**keep), either.positions[sliced.keeps(**keep)[either.positions]])


@settings(max_examples=12, deadline=None)
@given(sliced=sliced_streams, within=st.integers(0, 50), side=st.sampled_from(["around", "before", "after"]))
def test_near_stays_inside_the_context(
    sliced: Sliced, within: int, side: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = write_sliced(tmp_path_factory.mktemp("index") / "i", sliced)
    context = index.context
    other = rebuilt(index, "a", 1)
    expected: list[int] = []
    reached: list[float] = []
    for position in fired(index, 0):
        first = position // context * context
        start = max(position - (0 if side == "after" else within), first)
        end = min(position + (0 if side == "before" else within) + 1, first + context)
        if other[start:end].any():
            expected.append(position)
            reached.append(np.abs(other[start:end]).max())
    found = index[0].near(index[1], within, side)
    np.testing.assert_array_equal(found.positions, expected)
    assert found.operands == (("a", 0), ("a", 1))
    np.testing.assert_array_equal(found.values[:, 0], rebuilt(index, "a", 0)[found.positions])
    np.testing.assert_array_equal(np.abs(found.values[:, 1]), np.array(reached, np.float32))
    assert np.isin(found.values[:, 1], other).all()


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stream, LatentIndex]:
    stream = make_stream(1, n_contexts=200, context=32, vocab=5000, density=0.1)
    return stream, write(tmp_path_factory.mktemp("index") / "i", stream, batch=64)


def test_windows_of_a_set_are_those_of_its_strength(rich: tuple[Stream, LatentIndex], tmp_path: Path) -> None:
    stream, index = rich
    again = write(tmp_path / "i", stream, batch=3, segment_tokens=30 * stream.context)
    a, b = (int(i) for i in index["a"].ranking("frequency")[:2])
    for make in (lambda i: i[a] & i[b], lambda i: i[a] | i[b], lambda i: i[a] - i[b], lambda i: i[a].near(i[b], 3)):
        found, other = make(index), make(again)
        dense = np.zeros(index.n_tokens, np.float32)
        dense[found.positions] = found.strength
        truth = peaks(dense, 32, 4, 4, True)
        windows = found.top(20, context=(4, 4))
        assert [(w.position, *s) for w, s in zip(windows, spans(windows, 32), strict=True)] == greedy(
            truth, stream.tokens.reshape(-1), 20
        )
        for kind in ("top", "quantiles", "random", "importance"):
            drawn = found.windows(kind, 12, "score", (4, 4), seed=2)
            assert 3 < len(drawn) <= 12 and {w.role for w in drawn} == {"score"}
            same(drawn, other.windows(kind, 12, "score", (4, 4), seed=2))
            for window, (start, end) in zip(drawn, spans(drawn, 32), strict=True):
                np.testing.assert_array_equal(window.values, dense[start:end])
        for kind in ("random", "similar"):
            silent = found.negatives(kind, 10, context=(2, 2))
            assert len(silent) == 10 and not any(dense[s:e].any() for s, e in spans(silent, 32))
    with pytest.raises(ConfigError, match="belong to one latent"):
        (index[a] & index[b]).negatives("neighbours", 3)


def test_a_big_set_reads_like_a_big_latent(rich: tuple[Stream, LatentIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    _, index = rich
    found = index[0] | index[1]
    whole = found.top(30, context=(3, 3)), found.negatives("random", 30, context=(1, 1))
    for module, name, value in (
        ("drawing", "SAMPLE", 20), ("drawing", "FEW", 5), ("negatives", "WHOLE", 20), ("firings", "WHOLE", 20)
    ):  # fmt: skip
        monkeypatch.setattr(f"unmix.index.{module}.{name}", value)
    same(whole[0], found.top(30, context=(3, 3)))
    same(whole[1], found.negatives("random", 30, context=(1, 1)))
    assert len(found.windows("random", 30, "score", context=(3, 3))) == 30


def test_how_a_set_shows_itself(rich: tuple[Stream, LatentIndex], tmp_path: Path) -> None:
    _, index = rich
    assert repr(index[0] & index[1]).startswith("<latent set (a:0 & a:1): ")
    name = ((index[0] | index[1]) - index[2].near(index[3], 4, "before")).restrict("score", {}).name
    assert name == "((a:0 | a:1) - (a:2 near a:3 within 4 before))[score, {}]"
    shown = (index[0] | index[1])._repr_html_()
    assert shown.count("<div") == 6 and "latent set" in shown
    other = write(tmp_path / "i", make_stream(2, names=("a", "b")))
    crossed = other["a"][0] | other["b"][0]
    assert crossed.operands == (("a", 0), ("b", 0))
    for call, message in [
        (lambda: index[0] & other["a"][0], "a:0 is of the index .* and a:0 of .*: positions of two indexes cannot be"),
        (lambda: index[0].near(index[1], -1), "within is -1, expected 0 tokens or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            call()


def test_different_sets_draw_differently(rich: tuple[Stream, LatentIndex]) -> None:
    _, index = rich
    pairs = [index[0] | index[1], index[1] | index[0], (index[0] | index[1]).restrict("train")]
    drawn = [[w.position for w in found.windows("random", 20, "train", (2, 2))] for found in pairs]
    assert all(a != b for a, b in combinations(drawn, 2))


def test_a_dead_latent_combines(tmp_path: Path) -> None:
    index = write(tmp_path / "i", make_stream(1))
    dead, alive = index[4], index[int(index["a"].ranking("frequency")[0])]
    assert (dead & alive).count == (dead - alive).count == dead.near(alive, 3).count == alive.near(dead, 3).count == 0
    np.testing.assert_array_equal((dead | alive).positions, alive.as_set().positions)
    assert dead.overlap(alive).jaccard == dead.overlap(dead).lift == 0
    assert (dead & alive).top(3) == [] and len((dead & alive).negatives("random", 3)) == 3
    assert make_sliced(1).slices.keys() == {"speaker", "label"}
