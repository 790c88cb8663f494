"""The benchmarks' clockwork: turns, ratios and spreads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from benchmarks._timing import Spread, alternate, speedup, table


def test_contestants_take_turns() -> None:
    """Each runs once a round, warm-up included, and the order of rounds differs."""
    order: list[str] = []

    def contestant(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    times = alternate({name: contestant(name, i + 1.0) for i, name in enumerate("abc")}, rounds=8, warmup=2)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 10
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert times == {"a": [1.0] * 8, "b": [2.0] * 8, "c": [3.0] * 8}


def test_ratios_are_formed_inside_a_round() -> None:
    """Noise that slows a whole round leaves the ratio alone."""
    times = {"slow": [4.0, 40.0, 8.0], "fast": [1.0, 10.0, 2.0]}
    assert speedup(times, "fast", "slow") == Spread(4.0, 4.0, 4.0)
    assert speedup(times, "slow", "fast").median == 0.25


def test_a_spread_is_a_median_with_its_tenths() -> None:
    """By hand, over 0 to 10."""
    assert Spread.of([float(i) for i in reversed(range(11))]) == Spread(5.0, 1.0, 9.0)
    assert Spread.of([2.0]).show() == "2.00 (2.00–2.00)"
    assert Spread(0.005, 0.004, 0.006).show(1, 1000) == "5.0 (4.0–6.0)"


def test_rounds_must_match() -> None:
    """A contestant that missed a round is an error, not a shorter list."""
    with pytest.raises(ValueError, match=r"shorter|longer"):
        speedup({"a": [1.0], "b": [1.0, 2.0]}, "a", "b")


def test_tables_are_markdown() -> None:
    """Text left, figures right."""
    assert table(["", "ms"], [["x", "1"]]) == "|  | ms |\n| --- | ---: |\n| x | 1 |"
