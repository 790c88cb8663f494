"""Planted differences are found, and false ones are as rare as promised."""

from __future__ import annotations

import numpy as np
import pytest

from index.differences.simulated import counts, documents, latents
from unmix.index.differences.evidence import Counts, Evidence, weigh
from unmix.index.differences.testing import q_values, share_p

LATENTS, PLANTED, SEEDS, Q = 300, 40, 8, 0.05


def simulate(
    seed: int, sizes: tuple[int, int], lengths: tuple[float, float], factor: float, uneven: float = 1.0
) -> tuple[np.ndarray, Counts, Counts]:
    """Which latents were made commoner on the first side, and both sides' counts."""
    rng = np.random.default_rng(seed)
    presence, intensity = latents(rng, LATENTS)
    planted = np.zeros(LATENTS, bool)
    if factor != 1:
        planted[rng.choice(LATENTS, PLANTED, replace=False)] = True
    more = np.minimum(presence * np.where(planted, factor, 1), 0.97)
    a = counts(*documents(rng, sizes[0], more, intensity, lengths[0], uneven))
    return planted, a, counts(*documents(rng, sizes[1], presence, intensity, lengths[1], uneven))


def found(evidence: Evidence) -> np.ndarray:
    return np.nan_to_num(evidence.q, nan=1.0) <= Q


@pytest.mark.parametrize(
    ("sizes", "lengths", "factor", "uneven", "power"),
    [
        ((400, 400), (200, 200), 2, 1.0, 0.45),
        ((400, 100), (200, 200), 2, 1.0, 0.2),
        ((150, 150), (200, 200), 3, 1.5, 0.45),
        ((1000, 200), (200, 1000), 3, 1.0, 0.3),
        ((400, 400), (200, 1000), 3, 1.0, 0.1),
        ((1000, 200), (200, 1000), 3, 1.5, 0.2),
    ],
    ids=["equal sides", "a small side", "few documents", "a small side of long ones", "long ones", "uneven clusters"],
)
def test_false_discoveries_are_as_rare_as_promised(
    sizes: tuple[int, int], lengths: tuple[float, float], factor: float, uneven: float, power: float
) -> None:
    """Realised share of false ones, averaged over seeds, and the least share of planted ones that is found."""
    false, right = list[float](), list[float]()
    for seed in range(SEEDS):
        planted, a, b = simulate(seed, sizes, lengths, factor, uneven)
        evidence = weigh(a, b, 10)
        hits = found(evidence)
        false.append(float((hits & ~planted).sum() / max(hits.sum(), 1)))
        right.append(float((hits & planted).sum() / (planted & evidence.tested).sum()))
    assert np.mean(false) <= Q
    assert np.mean(right) >= power


@pytest.mark.parametrize("lengths", [(200.0, 200.0), (200.0, 1000.0)], ids=["alike", "unlike"])
def test_halves_of_one_corpus_do_not_differ(lengths: tuple[float, float]) -> None:
    """Ten null splits of 300 latents: about one in twenty may have a discovery, and none has more than two."""
    per_split = [int(found(weigh(*simulate(seed, (300, 300), lengths, 1)[1:], 10)).sum()) for seed in range(10)]
    assert sum(per_split) <= 3


def test_null_p_values_are_not_small_too_often() -> None:
    p = np.concatenate([weigh(*simulate(seed, (300, 300), (200, 200), 1)[1:], 10).p for seed in range(6)])
    assert (p[~np.isnan(p)] < 0.05).mean() <= 0.055


def test_counting_tokens_would_reject_nearly_everything() -> None:
    """The same null split, tested as if tokens were independent: clustering alone makes hundreds of discoveries."""
    _, a, b = simulate(0, (300, 300), (200, 200), 1)
    by_tokens = q_values(share_p(a.firings, a.tokens, b.firings, b.tokens)) <= Q
    assert by_tokens.sum() > LATENTS / 2
    assert found(weigh(a, b, 10)).sum() == 0


def test_counting_documents_alone_would_take_length_for_a_difference() -> None:
    """Nothing differs but the length of the documents, and shares of documents do."""
    _, a, b = simulate(0, (400, 400), (200, 1000), 1)
    by_shares = q_values(share_p(a.documents, a.n_documents, b.documents, b.n_documents)) <= Q
    assert by_shares.sum() > LATENTS / 20
    assert found(weigh(a, b, 10)).sum() == 0


def test_swapping_the_sides_turns_the_signs_round() -> None:
    _, a, b = simulate(3, (300, 200), (200, 400), 2)
    one, other = weigh(a, b, 10), weigh(b, a, 10)
    np.testing.assert_allclose(one.log2_ratio, -other.log2_ratio, atol=1e-12)
    np.testing.assert_allclose(one.low, -other.high, atol=1e-12)
    np.testing.assert_allclose(one.q, other.q, rtol=1e-9)
    np.testing.assert_allclose(one.cohen_h, -other.cohen_h, atol=1e-12)


def test_nothing_seen_is_no_difference_and_little_is_a_small_one() -> None:
    """One firing document against none is drawn to a factor of 3, its interval holds 1; a hundred are not."""
    tokens, firings = np.full(500, 20), np.zeros((500, 3), np.int64)
    b = counts(tokens, firings)
    firings[:1, 1] = firings[:100, 2] = 1
    a = counts(tokens, firings)
    seen = weigh(a, b, 10)
    np.testing.assert_allclose(seen.log2_ratio, [0, np.log2(3), np.log2(201)])
    assert seen.low[1] < 0 < seen.high[1]
    assert seen.low[2] > 0
    assert seen.tested.tolist() == [False, False, True]
    assert np.isnan(seen.q[:2]).all()


@pytest.mark.parametrize(("n", "least"), [(400, 0.9), (1600, 0.93)])
def test_the_interval_holds_the_true_ratio(n: int, least: float) -> None:
    """Over 10 draws of 40 latents that are twice as common: nearly 19 of 20 intervals hold log2 2."""
    held = list[np.ndarray]()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        presence, intensity = np.full(40, 0.1), np.full(40, 0.05)
        a = counts(*documents(rng, n, 2 * presence, intensity))
        seen = weigh(a, counts(*documents(rng, n, presence, intensity)), 10)
        held.append((seen.low <= 1) & (seen.high >= 1))
    assert least <= np.mean(held) <= 0.97


def test_what_fires_in_every_document_is_told_by_its_rate() -> None:
    """Equal shares of 1, and a rate that is a tenth higher."""
    rng = np.random.default_rng(0)
    tokens = np.full(300, 100)
    a, b = (counts(tokens, 1 + rng.binomial(99, rate, (300, 1))) for rate in (0.33, 0.3))
    seen = weigh(a, b, 10)
    assert seen.p_share[0] == 1
    assert seen.q[0] < 1e-6
    assert 0 < seen.low[0] < np.log2(1.1) < seen.high[0]


def test_the_spread_is_the_sum_over_documents() -> None:
    rng = np.random.default_rng(1)
    tokens, firings = documents(rng, 50, np.full(4, 0.4), np.full(4, 0.1))
    for rate in (0.0, 0.02, 0.3):
        expected = ((firings - rate * tokens[:, None]) ** 2).sum(axis=0)
        np.testing.assert_allclose(counts(tokens, firings).spread(np.full(4, rate)), expected, rtol=1e-9)
