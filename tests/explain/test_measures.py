"""Figures whose value is known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from unmix.explain.measures import confusion, pearson


def test_by_hand() -> None:
    true = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    said = np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)
    found = confusion(true, said)
    assert (found.hits, found.false, found.missed, found.quiet) == (2, 1, 1, 4)
    assert found.precision == found.recall == found.f1 == pytest.approx(2 / 3)
    assert found.specificity == pytest.approx(4 / 5)
    assert found.balanced_accuracy == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found.accuracy == pytest.approx(6 / 8)


def test_a_judge_who_always_says_no_is_at_chance() -> None:
    true = np.array([True] * 4 + [False] * 10)
    found = confusion(true, np.zeros(14, bool))
    assert found.balanced_accuracy == 0.5
    assert found.accuracy == pytest.approx(10 / 14)
    assert (found.precision, found.recall, found.f1) == (None, 0.0, 0.0)


def test_undefined_is_none() -> None:
    nothing = confusion(np.zeros(3, bool), np.zeros(3, bool))
    assert (nothing.precision, nothing.recall, nothing.f1, nothing.balanced_accuracy) == (None, None, None, None)
    assert confusion(np.zeros(0, bool), np.zeros(0, bool)).accuracy is None


def test_weights_count_like_copies() -> None:
    rng = np.random.default_rng(0)
    true, said, copies = rng.random(40) < 0.4, rng.random(40) < 0.5, rng.integers(1, 5, 40)
    x, y = rng.normal(size=40), rng.normal(size=40)
    assert confusion(true, said, copies.astype(float)) == confusion(np.repeat(true, copies), np.repeat(said, copies))
    assert pearson(x, y, copies.astype(float)) == pytest.approx(pearson(np.repeat(x, copies), np.repeat(y, copies)))


def test_pearson() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 2 * x + 1) == pytest.approx(1)
    assert pearson(x, -x) == pytest.approx(-1)
    assert pearson(x, np.array([1.0, -1.0, -1.0, 1.0])) == pytest.approx(0)
    assert pearson(x, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(np.corrcoef(x, [1, 2, 4, 3])[0, 1])
    assert pearson(x, np.ones(4)) is None
    assert pearson(x[:0], x[:0]) is None
