"""P-values against closed forms, published values and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmix.index.differences.testing import cohen_h, fisher_p, log_factorial, normal_p, q_values, rate_p, share_p


def one(a: int, n: int, b: int, m: int) -> float:
    return float(fisher_p(np.array([a]), n, np.array([b]), m)[0])


def by_fractions(a: int, n: int, b: int, m: int) -> float:
    """Fisher's exact test in exact arithmetic."""
    ways = {x: math.comb(n, x) * math.comb(m, a + b - x) for x in range(max(0, a + b - m), min(a + b, n) + 1)}
    return float(Fraction(sum(way for way in ways.values() if way <= ways[a]), sum(ways.values())))


def test_log_factorials_are_those_of_math() -> None:
    n = np.array([0, 1, 2, 14, 15, 16, 17, 100, 12345, 10**6, 10**9])
    np.testing.assert_allclose(log_factorial(n), [math.lgamma(int(i) + 1) for i in n], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("table", "p"),
    [((3, 4, 1, 4), 0.4857142857), ((8, 10, 1, 6), 0.0349650350), ((10, 12, 3, 18), 0.0005367241)],
    ids=["the lady tasting tea", "8 of 10", "10 of 12"],
)
def test_fisher_gives_published_values(table: tuple[int, int, int, int], p: float) -> None:
    """R's fisher.test of these tables."""
    assert one(*table) == pytest.approx(p, rel=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_fisher_is_exact(n: int, m: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    assert one(a, n, b, m) == pytest.approx(by_fractions(a, n, b, m), rel=1e-9)


def test_fisher_cuts_long_distributions_without_a_trace() -> None:
    """A small side against a large one: far above the mean, at it, and at none."""
    for a, b in ((60, 3000), (3, 3000), (0, 3000), (300, 5000)):
        assert one(a, 300, b, 60_000) == pytest.approx(by_fractions(a, 300, b, 60_000), rel=1e-6)
        assert one(b, 60_000, a, 300) == one(a, 300, b, 60_000)


def test_normal_p_values() -> None:
    z = np.array([0.0, 1.959963984540054, -2.5758293035489, 39.0])
    np.testing.assert_allclose(normal_p(z), [1, 0.05, 0.01, 0], atol=1e-12)


def test_large_counts_take_the_normal_test_and_small_ones_the_exact_one() -> None:
    p = share_p(np.array([300, 5, 0, 1000]), 1000, np.array([240, 0, 0, 1000]), 1000)
    z = (0.3 - 0.24) / math.sqrt(0.27 * 0.73 * 2 / 1000)
    np.testing.assert_allclose(p, [math.erfc(z / math.sqrt(2)), by_fractions(5, 1000, 0, 1000), 1, 1], rtol=1e-9)


def test_both_tests_agree_where_they_meet() -> None:
    """At the border between them the normal p-value is near the exact one."""
    for a, b in ((40, 22), (55, 40), (48, 30)):
        near = share_p(np.array([a]), 500, np.array([b]), 500)[0]
        assert near == pytest.approx(one(a, 500, b, 500), rel=0.35)


def test_one_firing_a_document_makes_the_rate_test_the_poisson_one() -> None:
    """100 against 60 single firings over equal text: z = 40 / √160."""
    a, b = np.array([100.0]), np.array([60.0])
    p = rate_p((a - b) / 1000, (a, b), a + b, (1000, 1000), (1000, 1000))
    assert p[0] == pytest.approx(math.erfc(40 / math.sqrt(160) / math.sqrt(2)))


def test_q_values_are_benjamini_and_hochbergs() -> None:
    np.testing.assert_allclose(q_values(np.array([0.01, 0.04, 0.03, 0.005])), [0.02, 0.04, 0.04, 0.02])
    np.testing.assert_allclose(q_values(np.array([0.9, 1.0, 0.001])), [1, 1, 0.003])
    assert q_values(np.empty(0)).tolist() == []


def test_cohens_h() -> None:
    np.testing.assert_allclose(
        cohen_h(np.array([0.5, 1.0, 0.2]), np.array([0.25, 0.0, 0.2])), [math.pi / 6, math.pi, 0]
    )
