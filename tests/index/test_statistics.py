"""Stored figures against the dense codes, counted the slow way."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import Stream, make_stream, rebuilt, streams, write
from unmix.core.errors import ConfigError
from unmix.index.reader import LatentIndex
from unmix.index.statistics import chunks, histogram_bins, histogram_edges, top_tokens


@settings(max_examples=20, deadline=None)
@given(stream=streams, batch=st.integers(1, 8))
def test_every_figure_is_what_the_codes_say(
    stream: Stream, batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index = write(tmp_path_factory.mktemp("index") / "i", stream, batch)
    dense = stored(index, stream)
    fires, coder = dense != 0, index["a"]
    np.testing.assert_array_equal(fires, stream.counted("a") != 0)
    for role in range(4):
        truth = fires[stream.roles == role].sum(axis=(0, 1))
        np.testing.assert_array_equal(coder.figures.firings_by_role[:, role], truth)
    count = fires.sum(axis=(0, 1))
    counted = stream.mask.sum()
    np.testing.assert_allclose(coder.frequency, count / max(counted, 1), rtol=1e-12)
    np.testing.assert_array_equal(coder.max, np.abs(stream.counted("a")).max(axis=(0, 1)))
    np.testing.assert_array_equal(coder.alive, count > 0)
    np.testing.assert_allclose(coder.mean, dense.sum(axis=(0, 1)) / np.maximum(count, 1), rtol=1e-9, atol=1e-12)
    for i in range(dense.shape[-1]):
        fired = dense[..., i][fires[..., i]]
        std = fired.std() if len(fired) else 0
        np.testing.assert_allclose(coder.figures.std[i], std, rtol=1e-5, atol=1e-6 * np.abs(fired).max(initial=1e-9))
        edges, histogram = coder[i].histogram()
        np.testing.assert_array_equal(histogram, np.histogram(np.abs(fired), edges)[0])
        places = np.nonzero(fires[..., i])[1]
        bins = min(16, stream.context)
        truth = np.bincount(places * bins // stream.context, minlength=16)
        np.testing.assert_array_equal(coder.figures.places[i], truth)


def stored(index: LatentIndex, stream: Stream, name: str = "a") -> np.ndarray:
    """The codes [n_contexts, context, F] as the index holds them (rounded), float64; masked positions are 0."""
    shape = stream.codes[name].shape
    flat = np.stack([rebuilt(index, name, latent) for latent in range(shape[-1])], axis=-1)
    return flat.reshape(shape).astype(np.float64)


def slow_top(values: np.ndarray, stream: Stream, latent: int, role: int | None = None) -> list[tuple[int, float, int]]:
    sums: dict[int, float] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    dense = values[..., latent]
    for context, place in zip(*np.nonzero(dense), strict=True):
        if role is None or stream.roles[context] == role:
            sums[int(stream.tokens[context, place])] += abs(float(dense[context, place]))
            counts[int(stream.tokens[context, place])] += 1
    order = sorted(sums, key=lambda token: (-sums[token], token))
    return [(token, sums[token], counts[token]) for token in order[:10]]


@settings(max_examples=20, deadline=None)
@given(stream=streams)
def test_top_tokens_are_exact(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> None:
    index = write(tmp_path_factory.mktemp("index") / "i", stream)
    values = stored(index, stream)
    for latent in range(stream.codes["a"].shape[-1]):
        found = [(top.token, top.sum, top.count) for top in index[latent].top_tokens()]
        assert found == slow_top(values, stream, latent)
        assert all(top.mean == top.sum / top.count for top in index[latent].top_tokens())


def test_top_tokens_of_a_role_see_only_that_role(tmp_path: Path) -> None:
    stream = make_stream(3, n_contexts=60, vocab=50)
    index = write(tmp_path / "i", stream)
    values = stored(index, stream)
    for latent in range(4):
        found = index[latent].top_tokens(role="explain")
        assert [(top.token, top.sum, top.count) for top in found] == slow_top(values, stream, latent, role=2)
    with pytest.raises(ConfigError, match="n is 11, expected 0 to 10: an index keeps 10 top tokens"):
        index[0].top_tokens(11)


def test_search_by_token_names_every_latent_that_has_it(tmp_path: Path) -> None:
    stream = make_stream(4, names=("a", "b"), vocab=40)
    index = write(tmp_path / "i", stream)
    for token in range(40):
        truth = {
            (name, latent)
            for name in ("a", "b")
            for latent in range(5)
            if token in [top.token for top in index[name][latent].top_tokens()]
        }
        hits = index.search_token(token)
        assert {(hit.coder, hit.latent) for hit in hits} == truth
        assert [hit.sum for hit in hits] == sorted((hit.sum for hit in hits), reverse=True)
        for hit in hits:
            top = index[hit.coder][hit.latent].top_tokens()[hit.rank]
            assert (top.token, top.sum, top.count) == (token, hit.sum, hit.count)
        assert index.search_token(token, "b") == [hit for hit in hits if hit.coder == "b"]
    assert index.search_token(12345) == []
    with pytest.raises(ConfigError, match="token id -1 is out of range"):
        index.search_token(-1)


def test_rankings(tmp_path: Path) -> None:
    index = write(tmp_path / "i", make_stream(5))
    for by in ("max", "frequency", "mean"):
        values = getattr(index["a"], by)[index["a"].ranking(by)]
        assert (np.diff(values) <= 0).all()
    with pytest.raises(ConfigError, match=r"cannot rank latents by 'frequncy'. Did you mean 'frequency'\?"):
        index["a"].ranking("frequncy")
    np.testing.assert_allclose(
        index["a"].figures.frequency_in(("explain", "score")) * sum(index.description.counted[2:]),
        index["a"].figures.firings_by_role[:, 2:].sum(axis=1),
    )


def test_histogram_bins_lie_between_their_edges() -> None:
    edges = histogram_edges()
    exact = np.array([2.0**-20, 2.0**-16, 1.0, 2.0**0.5, 2.0, 3.0, 2.0**15.5, 2.0**16, 3e38, 1e-45], np.float32)
    bins = histogram_bins(exact)
    assert bins.tolist() == [0, 0, 32, 33, 34, 35, 63, 63, 63, 0]
    inside = np.float32(2.0) ** np.random.default_rng(0).uniform(-15, 15, 500).astype(np.float32)
    found = histogram_bins(inside.astype(np.float32))
    assert ((edges[found] <= inside * (1 + 1e-6)) & (inside <= edges[found + 1] * (1 + 1e-6))).all()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 50))
def test_chunks_cover_every_latent_once_and_keep_their_bound(counts: list[int], postings: int) -> None:
    runs = chunks(np.array(counts), postings)
    assert [i for first, last in runs for i in range(first, last)] == list(range(len(counts)))
    assert all(sum(counts[a:b]) <= postings or b - a == 1 for a, b in runs)


def test_figures_do_not_depend_on_the_chunks__of_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(6, n_contexts=40)
    whole = write(tmp_path / "whole", stream)
    monkeypatch.setattr("unmix.index.derive.chunks", lambda counts, postings=1: chunks(counts, 1))
    split = write(tmp_path / "split", stream)
    assert split.hash == whole.hash


def test_top_tokens_with_the_largest_ids() -> None:
    tokens = np.array([2**32 - 1, 0, 2**32 - 1, 5])
    ids, sums, counts = top_tokens(np.array([0, 4]), np.ones(4, np.int64), tokens, np.array([1.0, 2.5, 2.0, 2.5]))
    assert ids[1, :4].tolist() == [2**32 - 1, 0, 5, -1]
    assert sums[1, :3].tolist() == [3.0, 2.5, 2.5] and counts[1, :3].tolist() == [2, 1, 1]
    assert ids[0].tolist() == [-1] * 10
