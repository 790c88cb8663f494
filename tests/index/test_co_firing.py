"""Neighbours by Jaccard index: exact on small indexes, near on a sample, and decided by positions alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.oracle import Stream, make_stream, streams, write
from unmix.index import co_firing
from unmix.index.co_firing import Sample, levels, sample_size
from unmix.index.derive import derive


def slow(fires: np.ndarray, latent: int) -> list[tuple[int, float]]:
    """Neighbours of a latent of `fires [positions, F]`, by falling Jaccard (float32), then by id."""
    shared = (fires & fires[:, [latent]]).sum(axis=0)
    union = (fires | fires[:, [latent]]).sum(axis=0)
    jaccard = np.divide(shared, union, out=np.zeros(len(shared)), where=union > 0).astype(np.float32)
    found = [i for i in range(len(shared)) if i != latent and shared[i]]
    return [(i, float(jaccard[i])) for i in sorted(found, key=lambda i: (-jaccard[i], i))][:64]


def neighbours(ids: np.ndarray, jaccard: np.ndarray) -> list[tuple[int, float]]:
    return [(int(i), float(j)) for i, j in zip(ids, jaccard, strict=True) if i >= 0]


@settings(max_examples=25, deadline=None)
@given(stream=streams)
def test_a_small_index_is_exact(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> None:
    figures = write(tmp_path_factory.mktemp("index") / "i", stream)["a"].figures
    fires = stream.counted("a").reshape(-1, stream.codes["a"].shape[-1]) != 0
    for latent in range(fires.shape[1]):
        assert neighbours(figures.co_firing_ids[latent], figures.co_firing_jaccard[latent]) == slow(fires, latent)


def test_many_latents_and_the_best_64(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    fires = rng.random((400, 150)) < rng.uniform(0, 0.4, 150)
    fires[:, 7] = False
    truth = [slow(fires, latent) for latent in range(150)]
    for at_once in (1, 500, 2**20):
        monkeypatch.setattr(co_firing, "AT_ONCE", at_once)
        assert sampled(fires) == truth


def sampled(fires: np.ndarray, pieces: int = 0) -> list[list[tuple[int, float]]]:
    """Neighbours of every latent, through `Sample`."""
    counts = fires.sum(axis=0)
    sample = Sample(counts, len(fires))
    latent, positions = np.nonzero(fires.T)
    if pieces:
        for i in range(fires.shape[1]):
            for piece in np.array_split(positions[latent == i], pieces):
                sample.add_piece(i, piece)
    else:
        half = fires.shape[1] // 2
        sample.add(0, counts[:half], positions[latent < half])
        sample.add(half, counts[half:], positions[latent >= half])
    ids, jaccard = (np.concatenate(rows) for rows in zip(*sample.neighbours(), strict=True))
    return [neighbours(*row) for row in zip(ids, jaccard, strict=True)]


def test_a_sample_is_near_and_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    n, planted = 60_000, rng.uniform(0.1, 0.95, 12)
    fires = np.zeros((n, 25), bool)
    for i, share in enumerate(planted):  # pairs that share a known part of their firings
        both = rng.random(n) < 0.1
        fires[:, 2 * i], fires[:, 2 * i + 1] = both, np.where(rng.random(n) < share, both, rng.random(n) < 0.1)
    fires[:40, 24] = fires[:40, 0]  # a rare one
    monkeypatch.setattr(co_firing, "PAIRS", 1)
    for least in (64, 1024):
        monkeypatch.setattr(co_firing, "LEAST", least)
        monkeypatch.setattr(co_firing, "MOST", least)
        found = sampled(fires)
        wrong = []
        for i in range(12):
            truth = dict(slow(fires, 2 * i))[2 * i + 1]
            near = dict(found[2 * i])[2 * i + 1]
            wrong.append((near - truth) / np.sqrt(truth * (1 - truth) / least))
        assert np.abs(wrong).max() < 4.5 and np.abs(wrong).mean() < 1.6
        assert found == sampled(fires, pieces=7)
    # What fires no more often than a sample holds is compared whole.
    monkeypatch.setattr(co_firing, "MOST", 2**20)
    monkeypatch.setattr(co_firing, "LEAST", 2**20)
    assert sampled(fires) == [slow(fires, latent) for latent in range(25)]


def test_levels_halve() -> None:
    found = np.bincount(levels(np.arange(2**17, dtype=np.int64)), minlength=33)
    assert found.sum() == 2**17
    np.testing.assert_allclose(found[:6] / 2**17, 0.5 ** np.arange(1, 7), rtol=0.05)
    # Every hundred-and-twenty-eighth position, the first of each context, is no special case.
    strided = np.bincount(levels(np.arange(0, 2**24, 128, dtype=np.int64)), minlength=33)
    np.testing.assert_allclose(strided[:6] / 2**17, 0.5 ** np.arange(1, 7), rtol=0.05)


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=50))
def test_sample_sizes(counts: list[int]) -> None:
    size = sample_size(np.array(counts), max(counts) + 1)
    assert size == max(counts) + 1 or 64 <= size <= 4096


def test_the_sizes_of_large_indexes() -> None:
    assert sample_size(np.full(2048, 500), 2**15) == 2**15  # 1 M postings: everything
    assert sample_size(np.full(16_384, 6_100), 3_125_000) >= 256  # 100 M
    assert sample_size(np.full(131_072, 763), 3_125_000) >= 64  # 100 M
    assert 131_072 * sample_size(np.full(131_072, 7_630), 31_250_000) <= 2**24  # 1 G


def test_segments_and_budgets_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co_firing, "PAIRS", 1)
    monkeypatch.setattr(co_firing, "MOST", 16)
    monkeypatch.setattr(co_firing, "LEAST", 16)
    stream = make_stream(14, n_contexts=80, n_latents=12)
    one = write(tmp_path / "one", stream)
    write(tmp_path / "many", stream, segment_tokens=7 * stream.context, budget_bytes=1)
    files = [
        [(tmp_path / i / f"a/statistics/co_firing_{x}.bin").read_bytes() for x in ("ids", "jaccard")]
        for i in ("one", "many")
    ]
    assert files[0] == files[1]
    monkeypatch.setattr("unmix.index.derive.DENSE", 5)
    monkeypatch.setattr("unmix.index.derive.BLOCK", 11)
    derive(tmp_path / "one", one.description, "a", 1)
    assert [(tmp_path / f"one/a/statistics/co_firing_{x}.bin").read_bytes() for x in ("ids", "jaccard")] == files[0]
