"""From ledger rows to lists, distributions, means."""

from __future__ import annotations

import pytest

from unmix.viewer.scores import (
    BINS,
    ExplanationRow,
    distributions,
    explanations_by_latent,
    flat_scores,
    headline,
    mean_interval,
    score_name,
    summarise,
    summary_rows,
)


def row(
    latent: int, f1: float | None = None, *, text: str | None = "words", explainer: str = "ngram", **more
) -> ExplanationRow:
    scores = {} if f1 is None else {"detection": {"f1": f1, "recall": {"value": f1 / 2, "low": 0.0, "high": 1.0}}}
    return {"latent": latent, "explainer": explainer, "text": text, "scores": scores, **more}


def test_scores_may_name_their_scorer_or_not() -> None:
    nested = flat_scores({"detection": {"f1": 0.5}})
    assert nested == [{"scorer": "detection", "figure": "f1", "value": 0.5, "low": None, "high": None}]
    flat = flat_scores({"f1": {"value": 0.5, "low": 0.4, "high": 0.6}})
    assert flat == [{"scorer": "", "figure": "f1", "value": 0.5, "low": 0.4, "high": 0.6}]
    assert flat_scores(None) == []


def test_a_failure_is_no_text() -> None:
    found = explanations_by_latent([row(3, text=None, error="time out"), row(3, 0.5), row(4, text=None)])
    assert [(one["text"], one["error"]) for one in found[3]] == [(None, "time out"), ("words", None)]
    assert found[4][0]["error"] == "no explanation was given"


def test_random_explanations_are_for_comparison_only() -> None:
    rows = [row(1, 0.9), row(1, 0.3, baseline=True), row(1, 0.2, explainer="random:ngram"), row(1, explainer="random")]
    assert [one["scores"][0]["value"] for one in explanations_by_latent(rows)[1]] == [0.9]


def test_the_headline_prefers_f1() -> None:
    by_latent = explanations_by_latent(
        [{"latent": 0, "explainer": "e", "text": "t", "scores": {"correlation": 0.1, "f1": 0.2}}]
    )
    assert headline(by_latent[0]) == ("", "f1")
    assert headline([]) is None
    assert [score_name(x) for x in (None, ("", "f1"), ("fuzz", "auc"), ("", "correlation"))] == [
        "", "F1", "AUC (fuzz)", "Correlation",
    ]  # fmt: skip


def test_distributions_hold_every_score_and_the_baseline() -> None:
    rows = [row(i, 0.05 + 0.1 * i) for i in range(10)] + [row(i, 0.31, baseline=True) for i in range(4)]
    first, second = distributions(rows)
    assert (first["figure"], second["figure"]) == ("f1", "recall")
    assert sum(first["histogram"]["counts"]) == 10
    assert len(first["histogram"]["edges"]) == BINS + 1
    assert first["mean"] == pytest.approx(0.5)
    assert first["baseline"] is not None
    assert first["baseline"].index(4) == 6
    assert first["baseline_mean"] == 0.31


def test_a_signed_figure_has_a_signed_axis() -> None:
    rows: list[ExplanationRow] = [{"latent": 0, "explainer": "e", "text": "t", "scores": {"correlation": -1.0}}]
    (found,) = distributions(rows)
    assert found["histogram"]["edges"][0] == -1.0
    assert found["histogram"]["counts"][0] == 1
    assert found["baseline"] is None


def test_the_summary_counts_failures_against_coverage() -> None:
    rows = [row(i, 0.5) for i in range(6)] + [row(6, text=None), row(7)] + [row(0, text=None, explainer="llm")]
    found = summarise(rows)
    assert [(s["explainer"], s["figure"], s["done"], s["asked"]) for s in found] == [
        ("ngram", "f1", 6, 8), ("ngram", "recall", 6, 8), ("llm", "", 0, 1),
    ]  # fmt: skip
    assert found[0]["mean"] == found[0]["low"] == found[0]["high"] == 0.5
    assert found[2]["mean"] is None


def test_the_baseline_stands_beside_its_explainer() -> None:
    for chance in (row(0, 0.2, baseline=True), row(0, 0.2, explainer="random:ngram")):
        found = summarise([row(0, 0.9), row(1, 0.7), chance])
        assert distributions([row(0, 0.9), chance])[0]["baseline_mean"] == 0.2
        assert [(s["figure"], s["baseline"], s["mean"]) for s in found[:2]] == [("f1", False, 0.8), ("f1", True, 0.2)]


def test_rows_summed_up_elsewhere_are_taken_as_they_are() -> None:
    given = {
        "explainer": "e",
        "scorer": "s",
        "figure": "f1",
        "mean": 0.5,
        "low": 0.4,
        "high": 0.6,
        "median": 0.5,
        "done": 3,
        "asked": 4,
    }
    shown = {key: value for key, value in given.items() if key != "median"}
    chance = {**given, "explainer": "random:e", "mean": 0.1, "baseline": None}
    other = {**given, "figure": "recall", "baseline": 0.1}
    assert summary_rows([{**given, "baseline": 0.1}, other, chance]) == [
        {**shown, "baseline": False},
        {**shown, "mean": 0.1, "baseline": True},
        {**shown, "figure": "recall", "baseline": False},
    ]


def test_the_interval_holds_the_mean_and_is_the_same_every_time() -> None:
    import numpy as np

    values = np.random.default_rng(1).normal(0.5, 0.1, 200)
    low, high = mean_interval(values)
    assert low is not None
    assert high is not None
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 200**0.5, rel=0.2)
    assert mean_interval(values) == (low, high)
    assert mean_interval(values[:1]) == (None, None)
