"""Means and medians with intervals; ranking by what is plain."""

from __future__ import annotations

import numpy as np
import pytest

from unmix.explain.ranking import clarity, usualness
from unmix.explain.table import spread_of


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = sum(s["low"] <= 0.5 <= s["high"] for s in (spread_of(rng.random(60).tolist()) for _ in range(100)))
    assert 88 <= held <= 100


def test_mean_and_median_by_hand() -> None:
    found = spread_of([0.0, 0.5, 1.0, 1.0])
    assert (found["mean"], found["median"]) == (0.625, 0.75)
    assert found["low"] < 0.625 < found["high"]
    assert found == spread_of([0.0, 0.5, 1.0, 1.0])
    assert spread_of([0.4]) == dict.fromkeys(found, pytest.approx(0.4))


def test_usual_frequencies() -> None:
    assert usualness(1e-3) == 1
    assert usualness(0.1) == pytest.approx(np.exp(-1))
    assert usualness(2e-5) == pytest.approx(np.exp(-1))
    assert usualness(0.0) == 0


def test_plain_lines_are_clearer() -> None:
    plain = clarity('the word "return"')
    assert plain == 1
    for worse in (
        'often "return"', '"return" and 12 more', '"a" or ","', '"return", among others', '"return" ' + 80 * "x",
    ):  # fmt: skip
        assert clarity(worse) < plain
