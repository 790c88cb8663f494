"""Figures by document, role and slice, moments, quantiles and token shares, against the dense codes; and that nothing
but the postings decides them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from index.oracle import ArrayCodes, Stream, make_stream, rebuilt, streams, write
from unmix.core.errors import ConfigError, CorruptError
from unmix.index.derive import derive
from unmix.index.figures import SliceFigures
from unmix.index.reader import LatentIndex, open_index
from unmix.index.statistics import RANKS, best_tokens, tenth_largest, token_groups
from unmix.index.writer import IndexWriter

SLICES = {"speaker": ("none", "user", "assistant"), "label": ("a", "b")}


def dense_codes(index: LatentIndex, stream: Stream) -> np.ndarray:
    """The codes [positions, F] as the index holds them, float64."""
    return np.stack([rebuilt(index, "a", i) for i in range(stream.codes["a"].shape[-1])], axis=-1).astype(np.float64)


def sliced(folder: Path, stream: Stream, seed: int) -> tuple[LatentIndex, dict[str, np.ndarray]]:
    """An index with two slicings: `speaker` changes inside documents, `label` hangs on the document."""
    rng = np.random.default_rng(seed)
    numbers = {
        "speaker": rng.integers(0, 3, stream.tokens.shape),
        "label": rng.integers(0, 2, stream.documents.max() + 1)[stream.documents],
    }
    codes = {"a": ArrayCodes.from_dense(stream.codes["a"].reshape(-1, stream.codes["a"].shape[-1]))}
    n = stream.codes["a"].shape[-1]
    with IndexWriter(folder, {"a": n}, stream.context, slices=SLICES) as writer:
        writer.add(stream.tokens, stream.roles, stream.documents, stream.mask, codes, numbers)
    return open_index(folder), numbers


def check_partition(
    found: SliceFigures, dense: np.ndarray, numbers: np.ndarray, documents: np.ndarray, mask: np.ndarray
) -> None:
    for value in range(len(found.values)):
        here = (numbers == value) & mask
        assert found.tokens[value] == here.sum()
        assert found.n_documents[value] == len(set(documents[here].tolist()))
        n = np.bincount(documents[here], minlength=documents.max() + 1)
        assert found.token_squares[value] == (n**2).sum()
        np.testing.assert_array_equal(found.firings[:, value], (dense[here] != 0).sum(axis=0))
        np.testing.assert_allclose(found.sum[:, value], dense[here].sum(axis=0), rtol=1e-12, atol=1e-300)
        for latent in range(dense.shape[1]):
            fires = here & (dense[:, latent] != 0)
            assert found.documents[latent, value] == len(set(documents[fires].tolist()))
            fired = np.bincount(documents[fires], minlength=len(n))
            assert found.squares[latent, value] == (fired**2).sum()
            assert found.cross[latent, value] == (fired * n).sum()


@settings(max_examples=25, deadline=None)
@given(stream=streams)
def test_documents_roles_and_slices(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> None:
    index, numbers = sliced(tmp_path_factory.mktemp("index") / "i", stream, 1)
    dense, figures = dense_codes(index, stream), index["a"].figures
    documents, mask = stream.documents.reshape(-1), stream.mask.reshape(-1)
    assert figures.n_documents == len(set(documents[mask].tolist()))
    for latent in range(dense.shape[1]):
        assert figures.documents[latent] == len(set(documents[dense[:, latent] != 0].tolist()))
    check_partition(figures.whole, dense, np.zeros(len(mask), int), documents, mask)
    at = np.arange(stream.context) * min(16, stream.context) // stream.context
    truth = np.bincount(np.broadcast_to(at, stream.mask.shape)[stream.mask], minlength=16)
    np.testing.assert_array_equal(figures.place_totals, truth)
    check_partition(figures.in_roles, dense, np.repeat(stream.roles, stream.context), documents, mask)
    for name, values in SLICES.items():
        assert figures.in_slice(name).values == values
        check_partition(figures.in_slice(name), dense, numbers[name].reshape(-1), documents, mask)
    np.testing.assert_array_equal(figures.firings, figures.in_slice("label").firings.sum(axis=1))


def test_documents_may_come_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(11, n_contexts=40, density=0.6)
    shuffled = np.random.default_rng(0).permutation(stream.documents.reshape(-1)).reshape(stream.documents.shape)
    stream = Stream(stream.tokens, stream.roles, shuffled, stream.mask, stream.codes)
    for table in (2**24, 0):  # documents in a table, or searched for
        monkeypatch.setattr("unmix.index.totals.TABLE", table)
        index = write(tmp_path / str(table), stream)
        numbers = np.zeros(shuffled.size, int)
        dense, mask = dense_codes(index, stream), stream.mask.reshape(-1)
        check_partition(index["a"].figures.whole, dense, numbers, shuffled.reshape(-1), mask)
        roles = np.repeat(stream.roles, stream.context)
        check_partition(index["a"].figures.in_roles, dense, roles, shuffled.reshape(-1), mask)


def test_a_slicing_that_is_not_there(tmp_path: Path) -> None:
    figures = write(tmp_path / "i", make_stream(1))["a"].figures
    assert figures.in_slice("role") is figures.in_roles
    with pytest.raises(ConfigError, match=r"no slicing 'speaker' in this index. It has|no slicing 'speaker'"):
        figures.in_slice("speaker")


def moments(fired: np.ndarray) -> tuple[float, float]:
    """Skew and excess kurtosis."""
    if not len(fired) or np.ptp(fired) == 0:
        return 0.0, 0.0
    away = fired - fired.mean()
    variance = (away**2).mean()
    return (away**3).mean() / variance**1.5, (away**4).mean() / variance**2 - 3


@settings(max_examples=25, deadline=None)
@given(stream=streams)
def test_moments_extremes_and_quantiles(stream: Stream, tmp_path_factory: pytest.TempPathFactory) -> None:
    index = write(tmp_path_factory.mktemp("index") / "i", stream)
    dense, figures = dense_codes(index, stream), index["a"].figures
    for latent in range(dense.shape[1]):
        fired = dense[:, latent][dense[:, latent] != 0]
        strength = np.sort(np.abs(fired))
        skew, kurtosis = moments(fired)
        np.testing.assert_allclose(figures.skew[latent], skew, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(figures.kurtosis[latent], kurtosis, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(figures.mean_square[latent], (fired**2).mean() if len(fired) else 0, rtol=1e-9)
        np.testing.assert_allclose(figures.strength[latent], strength.sum(), rtol=1e-12)
        assert figures.extremes[latent].tolist() == [fired.min(initial=np.inf), fired.max(initial=-np.inf)] or not len(
            fired
        )
        truth = [strength[rank * (len(strength) - 1) // 100] if len(strength) else 0 for rank in RANKS]
        assert figures.quantiles[latent].tolist() == truth
        assert figures.min[latent] == truth[0]


def test_the_most_frequent_tokens_and_single_token_latents(tmp_path: Path) -> None:
    stream = make_stream(12, n_contexts=60, vocab=30)
    index = write(tmp_path / "i", stream)
    dense, tokens, figures = dense_codes(index, stream), stream.tokens.reshape(-1), index["a"].figures
    for latent in range(5):
        fires = dense[:, latent] != 0
        counts = np.bincount(tokens[fires], minlength=30)
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda token: (-counts[token], token))[:10]
        assert figures.frequent_token_ids[latent, : len(order)].tolist() == order
        assert figures.frequent_token_counts[latent, : len(order)].tolist() == counts[order].tolist()
        sums = np.bincount(tokens[fires], np.abs(dense[fires, latent]), minlength=30)
        np.testing.assert_allclose(figures.frequent_token_sums[latent, : len(order)], sums[order], rtol=1e-12)
        share = sums.max() / sums.sum() if fires.any() else 0
        np.testing.assert_allclose(figures.single_token_share[latent], share, rtol=1e-12)


def test_single_token_flags(tmp_path: Path) -> None:
    tokens = np.array([[7] * 9 + [1]] * 2)
    codes = np.ones((2, 10, 3), np.float32)
    codes[:, :4, 1] = 0  # latent 1: 5 of 6 on token 7
    codes[:, :8, 2] = 0  # latent 2: half and half
    stream = Stream(tokens, np.zeros(2, np.uint8), np.zeros((2, 10), int), np.ones((2, 10), bool), {"a": codes})
    figures = write(tmp_path / "i", stream)["a"].figures
    assert figures.single_token_share.tolist() == [0.9, 5 / 6, 0.5]
    assert figures.single_token_strong.tolist() == [True, False, False]
    assert figures.single_token_weak.tolist() == [True, True, True]


def statistics(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "a/statistics").iterdir()}


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("table", [0, 2**22])
def test_latents_too_dense_for_one_go_are_the_same_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, table: int
) -> None:
    stream = make_stream(13, n_contexts=50, vocab=40, density=0.7)
    whole, _ = sliced(tmp_path / "whole", stream, 2)
    for name, size in {"BLOCK": block, "DENSE": min(block, 20), "READ_POSTINGS": 3 * block}.items():
        monkeypatch.setattr(f"unmix.index.derive.{name}", size)
    monkeypatch.setattr("unmix.index.tally.TABLE", table)
    pieces, _ = sliced(tmp_path / "pieces", stream, 2)
    one, other = whole["a"].figures, pieces["a"].figures
    for name in (
        "firings", "documents", "extremes", "quantiles", "histogram", "places", "top_token_ids", "top_token_counts",
        "frequent_token_ids", "frequent_token_counts", "max", "n_documents",
    ):  # fmt: skip
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    for name in ("sum", "strength", "std", "skew", "kurtosis", "top_token_sums"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9, err_msg=name)
    for name in ("role", *SLICES):
        np.testing.assert_array_equal(one.in_slice(name).firings, other.in_slice(name).firings)
        for field in ("documents", "squares", "cross"):
            np.testing.assert_array_equal(getattr(one.in_slice(name), field), getattr(other.in_slice(name), field))
        np.testing.assert_allclose(one.in_slice(name).sum, other.in_slice(name).sum, rtol=1e-12)
    before = statistics(tmp_path / "pieces")
    for budget in (1, 10_000, 2**30):
        derive(tmp_path / "pieces", pieces.description, "a", budget)
        assert statistics(tmp_path / "pieces") == before


def test_segments_and_budgets_change_nothing(tmp_path: Path) -> None:
    stream = make_stream(14, n_contexts=40)
    write(tmp_path / "one", stream)
    write(tmp_path / "many", stream, segment_tokens=7 * stream.context, budget_bytes=1)
    assert statistics(tmp_path / "one") == statistics(tmp_path / "many")


def test_statistics_that_an_older_index_lacks(tmp_path: Path) -> None:
    index = write(tmp_path / "i", make_stream(1))
    (tmp_path / "i/a/statistics/documents.bin").unlink()
    with pytest.raises(CorruptError, match=r"a/statistics/documents\.bin: missing; `unmix index repair` derives"):
        _ = index["a"].figures.documents


def test_ten_of_a_run_reach_its_tenth_largest_or_so() -> None:
    rng = np.random.default_rng(0)
    lengths = np.concatenate([np.arange(140), rng.integers(0, 600, 30)])
    score = rng.integers(0, 50, lengths.sum()).astype(np.float64)
    found = tenth_largest(score, lengths)
    for least, run in zip(found, np.split(score, np.cumsum(lengths)[:-1]), strict=True):
        if len(run) <= 10:
            assert least == -np.inf
        else:
            assert (run >= least).sum() >= 10
            assert len(run) > 63 or least == np.sort(run)[-10]


def test_token_groups_with_wide_ids_and_many_firings() -> None:
    rng = np.random.default_rng(1)
    counts = np.array([0, 3000, 5, 0, 1])
    tokens = rng.choice([0, 5, 2**32 - 1, 2**31], counts.sum())
    latent = np.repeat(np.arange(5), counts)
    strength = rng.random(len(tokens))
    groups = token_groups(counts, latent, tokens, strength)
    truth = {(i, t): [0.0, 0] for i, t in zip(latent.tolist(), tokens.tolist(), strict=True)}
    for i, t, s in zip(latent.tolist(), tokens.tolist(), strength.tolist(), strict=True):
        truth[i, t] = [truth[i, t][0] + s, truth[i, t][1] + 1]
    keys = list(zip(groups.latent.tolist(), groups.token.tolist(), strict=True))
    assert keys == sorted(truth)
    assert [[s, c] for s, c in zip(groups.sums.tolist(), groups.counts.tolist(), strict=True)] == [
        truth[k] for k in keys
    ]
    ids, _, fired = best_tokens(groups, groups.by_count())
    assert ids[0].tolist() == [-1] * 10 and fired[1].sum() == 3000
