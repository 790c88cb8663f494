"""Rankings, noise, lists and latents by token set, on indexes small enough to count by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from index.oracle import Stream, make_stream, rebuilt, write
from unmix.core.errors import ConfigError
from unmix.index.rankings import (
    KINDS,
    Noise,
    chi_square_tail,
    frequency_histogram,
    listed,
    place_information,
    rank,
)
from unmix.index.reader import LatentIndex
from unmix.index.token_sets import latents_by_tokens

EVERYTHING = Noise(min_firings=1, min_documents=1)


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> LatentIndex:
    """Latent 0 fires anywhere, 1 on the first place of contexts, 2 in their last quarter, 3 five times in one document,
    4 never, 5 everywhere; latent 6 only on token 3."""
    rng = np.random.default_rng(0)
    shape = (200, 32)
    tokens = rng.integers(0, 20, shape)
    fires = np.zeros((*shape, 7), bool)
    fires[..., 0] = rng.random(shape) < 0.05
    fires[:, 0, 1] = rng.random(200) < 0.8
    fires[:, 24:, 2] = rng.random((200, 8)) < 0.2
    fires[0, :5, 3] = True
    fires[..., 5] = True
    fires[..., 6] = (tokens == 3) & (rng.random(shape) < 0.5)
    values = np.where(fires, rng.lognormal(0, 1, fires.shape), 0).astype(np.float32)
    stream = Stream(
        tokens,
        np.zeros(200, np.uint8),
        np.arange(200)[:, None] // 2 * np.ones(shape, int),
        np.ones(shape, bool),
        {"a": values},
    )
    return write(tmp_path_factory.mktemp("placed") / "i", stream, vocab=[f"w{i}" for i in range(20)])


@pytest.mark.parametrize("kind", KINDS)
def test_rankings_are_in_order_and_leave_noise_out(placed: LatentIndex, kind: str) -> None:
    figures = placed["a"].figures
    found = rank(figures, kind)
    steps = np.diff(found.values)
    assert (steps >= 0).all() if kind == "rare" else (steps <= 0).all()
    assert not {3, 4} & set(found.latents.tolist()) and found.considered == len(rank(figures, kind).latents)
    assert rank(figures, kind, 2).latents.tolist() == found.latents[:2].tolist()
    assert 5 not in rank(figures, kind, noise=Noise(max_frequency=0.5)).latents
    assert 6 not in rank(figures, kind, noise=Noise(single_token=False)).latents


def test_what_the_rankings_say(placed: LatentIndex) -> None:
    figures = placed["a"].figures
    assert rank(figures, "frequency").latents[0] == 5 and rank(figures, "frequency").values[0] == 1
    assert rank(figures, "frequency", noise=EVERYTHING).latents[-1] == 3
    assert rank(figures, "rare", noise=EVERYTHING).latents[0] == 3
    assert rank(figures, "token").latents[0] == 6 and rank(figures, "token").values[0] == 1
    assert rank(figures, "max").values[0] == figures.max.max()
    place = rank(figures, "place")
    assert place.latents.tolist() == [1, 2]
    # All firings in one of 16 bins, and in four of them.
    np.testing.assert_allclose(place.values, [4, 2], atol=0.1)
    with pytest.raises(ConfigError, match=r"no ranking by 'frequncy'. Did you mean 'frequency'\?"):
        rank(figures, "frequncy")
    with pytest.raises(ConfigError, match="n is -1, expected 0 or more"):
        rank(figures, "max", -1)


def test_lists(placed: LatentIndex) -> None:
    figures = placed["a"].figures
    assert listed(figures, "dead").tolist() == [4]
    assert listed(figures, "dense").tolist() == [5]
    assert listed(figures, "dense", 0.04).tolist() == [0, 2, 5]
    assert listed(figures, "single-token").tolist() == [6]
    with pytest.raises(ConfigError, match=r"no list of latents 'deaf'"):
        listed(figures, "deaf")


def test_places_of_few_firings_say_nothing_and_chance_is_uniform() -> None:
    rng = np.random.default_rng(1)
    totals = np.full(16, 1000)
    places = rng.multinomial(200, np.full(16, 1 / 16), 4000)
    bits, chance = place_information(places, totals)
    assert bits.mean() < 0.02
    np.testing.assert_allclose(np.quantile(chance, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04)
    bits, chance = place_information(np.array([np.zeros(16, int), np.eye(16, dtype=int)[3] * 500]), totals)
    assert bits[0] == 0 and chance[0] == 1
    np.testing.assert_allclose(bits[1], 4, atol=0.03)
    assert chance[1] == 0
    # A context of three positions fills three bins only, and never its own kind of place.
    bits, _ = place_information(np.array([[30, 0, 30, *[0] * 13]]), np.array([10, 10, 10, *[0] * 13]))
    np.testing.assert_allclose(bits, math.log2(3) - 1 - 2 / 120 / math.log(2), rtol=1e-9)


@pytest.mark.parametrize(
    "x,free,tail",  # R: pchisq(x, free, lower.tail = FALSE)
    [
        (3.841459, 1, 0.05),
        (5.991465, 2, 0.05),
        (24.99579, 15, 0.05),
        (37.69730, 15, 0.001),
        (26.29623, 16, 0.05),
        (0, 7, 1),
    ],
)
def test_the_tail_of_chi_square(x: float, free: int, tail: float) -> None:
    np.testing.assert_allclose(chi_square_tail(np.array([float(x)]), free), tail, rtol=1e-5)


def test_frequencies_of_several_coders_share_their_bins(tmp_path: Path) -> None:
    index = write(tmp_path / "i", make_stream(4, n_contexts=60, names=("a", "b")))
    figures = [coder.figures for coder in index.coders.values()]
    edges, counts = frequency_histogram(figures)
    assert edges[-1] == 0 and np.allclose(np.diff(edges), 0.25)
    for one, bins in zip(figures, counts, strict=True):
        np.testing.assert_array_equal(bins, np.histogram(np.log10(one.frequency[one.alive]), edges)[0])
        assert bins.sum() == one.alive.sum()


@pytest.mark.parametrize("tokens", [[3], [3, 5, 999_999], [0, 1, 2, 3, 4, 5, 6]])
def test_latents_by_tokens_are_counted_exactly(tokens: list[int], tmp_path: Path) -> None:
    stream = make_stream(21, n_contexts=60, n_latents=8, vocab=30)
    index = write(tmp_path / "i", stream)
    words, mask = stream.tokens.reshape(-1), stream.mask.reshape(-1)
    on = np.isin(words, tokens)
    for by in ("share", "strength", "recall", "f1", "count"):
        found = {h.latent: h for h in latents_by_tokens(index, tokens, by=by, noise=EVERYTHING, everywhere=True)}
        order = [getattr(hit, by) for hit in found.values()]
        assert order == sorted(order, reverse=True)
        for latent in range(8):
            dense = rebuilt(index, "a", latent).astype(np.float64)
            count = ((dense != 0) & on).sum()
            if not count:
                assert latent not in found
                continue
            hit = found[latent]
            share = count / (dense != 0).sum()
            assert (hit.count, hit.firings, hit.share) == (count, (dense != 0).sum(), share)
            np.testing.assert_allclose(hit.strength, np.abs(dense[on]).sum() / np.abs(dense).sum(), rtol=1e-12)
            np.testing.assert_allclose(hit.recall, count / (on & mask).sum(), rtol=1e-12)
            np.testing.assert_allclose(hit.lift, share / ((on & mask).sum() / mask.sum()), rtol=1e-12)
            np.testing.assert_allclose(hit.f1, 2 * count / ((dense != 0).sum() + (on & mask).sum()), rtol=1e-12)


def test_latents_by_tokens_looks_where_a_token_is_among_the_top(placed: LatentIndex) -> None:
    found = latents_by_tokens(placed, [3], 1)
    assert [hit.latent for hit in found] == [6] and found[0].share == 1
    np.testing.assert_allclose(found[0].lift, 20, rtol=0.15)
    assert latents_by_tokens(placed, [12345]) == []
    for tokens, by, message in (
        ([], "share", "expected at least one id"),
        ([-1], "share", "0 or more"),
        ([1], "x", "cannot order"),
    ):
        with pytest.raises(ConfigError, match=message):
            latents_by_tokens(placed, tokens, by=by)
