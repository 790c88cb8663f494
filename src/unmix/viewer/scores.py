"""From explanation rows to what is shown of them: one list for each latent, distributions, means with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from unmix.viewer.glossary import estimate
from unmix.viewer.shapes import Explanation, Score, ScoreDistribution, SummaryRow
from unmix.viewer.wire import number

BINS = 20
RESAMPLES = 1000
HEADLINES = ("f1", "balanced_accuracy", "correlation", "pearson", "accuracy", "auc")
"""The first of these figures that was scored stands in the table of latents."""
SIGNED = frozenset({"correlation", "pearson"})
"""Figures between −1 and 1; the others lie between 0 and 1."""

RANDOM = "random"
"""`random:ngram` deals `ngram`'s explanations out to the wrong latents: what chance gives."""

Key = tuple[str, str, str]
"""(explainer, scorer, figure)"""


class ExplanationRow(TypedDict):
    """One explanation of one latent, as the ledger gives it."""

    latent: int
    explainer: str
    text: str | None
    """None where explaining failed: a failure is never a text."""
    scores: Mapping[str, Any] | None
    """`{figure: x}` or `{scorer: {figure: x}}`, x a number or `{"value", "low", "high"}`; empty or None: not scored."""
    error: NotRequired[str | None]
    baseline: NotRequired[bool]
    """A random explanation (one of another latent), scored for comparison only."""


def is_baseline(row: ExplanationRow) -> bool:
    """Whether a row is there for comparison only."""
    return row.get("baseline") is True or explainer_of(row["explainer"])[1]


def explainer_of(name: str) -> tuple[str, bool]:
    """`(explainer, whether it is its random baseline)` of a ledger's name: `random:ngram` → `("ngram", True)`."""
    kind, _, source = name.partition(":")
    return (source or name, True) if kind == RANDOM else (name, False)


def flat_scores(scores: Mapping[str, Any] | None) -> list[Score]:
    """Every figure of a row; `scorer` is empty where the row does not say."""
    found: list[Score] = []
    for name, value in (scores or {}).items():
        if isinstance(value, Mapping) and "value" not in value:
            inner = cast("Mapping[str, Any]", value)
            found.extend(_score(str(name), str(figure), entry) for figure, entry in inner.items())
        else:
            found.append(_score("", str(name), value))
    return found


def _score(scorer: str, figure: str, entry: Any) -> Score:
    value, low, high = estimate(entry)
    return {"scorer": scorer, "figure": figure, "value": value, "low": low, "high": high}


def explanations_by_latent(rows: Iterable[ExplanationRow]) -> dict[int, list[Explanation]]:
    """`{latent: its explanations}` without the random ones, best headline score first."""
    found: dict[int, list[Explanation]] = defaultdict(list)
    for row in rows:
        if is_baseline(row):
            continue
        text, error = row.get("text"), row.get("error")
        found[int(row["latent"])].append(
            {
                "explainer": str(row["explainer"]),
                "text": None if text is None else str(text),
                "error": None if text is not None else str(error or "no explanation was given"),
                "scores": flat_scores(row.get("scores")),
            }
        )
    return dict(found)


def headline(rows: Iterable[Explanation]) -> tuple[str, str] | None:
    """`(scorer, figure)` that ranks the latents: the first of `HEADLINES` that any explanation has."""
    seen = dict.fromkeys((s["figure"], s["scorer"]) for row in rows for s in row["scores"] if s["value"] is not None)
    for wanted in HEADLINES:
        for figure, scorer in seen:
            if figure == wanted:
                return scorer, figure
    return next(((scorer, figure) for figure, scorer in seen), None)


def score_of(explanation: Explanation, wanted: tuple[str, str] | None) -> float | None:
    """The headline score of one explanation; None where it has none."""
    for score in explanation["scores"]:
        if (score["scorer"], score["figure"]) == wanted:
            return score["value"]
    return None


def score_name(wanted: tuple[str, str] | None) -> str:
    """`F1 (detection)`; empty where nothing was scored."""
    if wanted is None:
        return ""
    scorer, figure = wanted
    shown = figure.upper() if figure in ("f1", "auc") else figure.capitalize()
    return f"{shown} ({scorer})" if scorer else shown


def _collect(rows: Sequence[ExplanationRow]) -> tuple[dict[Key, list[float]], dict[Key, list[float]]]:
    own: dict[Key, list[float]] = defaultdict(list)
    random: dict[Key, list[float]] = defaultdict(list)
    for row in rows:
        target = random if is_baseline(row) else own
        for score in flat_scores(row.get("scores")):
            if score["value"] is not None:
                target[explainer_of(row["explainer"])[0], score["scorer"], score["figure"]].append(score["value"])
    return own, random


def _baseline_for(key: Key, random: dict[Key, list[float]]) -> list[float]:
    """The same explainer's random explanations, or any explainer's where it has none."""
    if key in random:
        return random[key]
    return [value for other, values in random.items() if other[1:] == key[1:] for value in values]


def distributions(rows: Sequence[ExplanationRow]) -> list[ScoreDistribution]:
    """A histogram for each explainer and figure, over latents; headline figures first."""
    own, random = _collect(rows)
    found: list[ScoreDistribution] = []
    for key in sorted(own, key=lambda key: (_figure_order(key[2]), key)):
        explainer, scorer, figure = key
        edges = np.linspace(-1.0 if figure in SIGNED else 0.0, 1.0, BINS + 1)
        baseline = _baseline_for(key, random)
        found.append(
            {
                "explainer": explainer,
                "scorer": scorer,
                "figure": figure,
                "histogram": {
                    "edges": [round(float(e), 6) for e in edges],
                    "counts": _counts(own[key], edges),
                    "outside": 0,
                },
                "mean": number(np.mean(own[key])),
                "baseline": _counts(baseline, edges) if baseline else None,
                "baseline_mean": number(np.mean(baseline)) if baseline else None,
            }
        )
    return found


def _figure_order(figure: str) -> int:
    return HEADLINES.index(figure) if figure in HEADLINES else len(HEADLINES)


def _counts(values: Sequence[float], edges: np.ndarray) -> list[int]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return [int(count) for count in counts]


def summarise(rows: Sequence[ExplanationRow]) -> list[SummaryRow]:
    """Means over latents with bootstrap intervals (seeded), the random explanations in the same table."""
    own, random = _collect(rows)
    asked: dict[tuple[str, bool], int] = defaultdict(int)
    for row in rows:
        asked[explainer_of(row["explainer"])[0], is_baseline(row)] += 1
    entries = [(key, values, False) for key, values in own.items()]
    entries += [(key, values, True) for key, values in random.items()]
    entries.sort(key=lambda entry: (_figure_order(entry[0][2]), entry[0], entry[2]))
    found = [_summary(key, values, asked[key[0], baseline], baseline) for key, values, baseline in entries]
    scored = {(row["explainer"], row["baseline"]) for row in found}
    for explainer, baseline in sorted(asked):
        if not baseline and (explainer, baseline) not in scored:
            found.append(_summary((explainer, "", ""), [], asked[explainer, baseline], baseline))
    return found


def _summary(key: Key, values: Sequence[float], asked: int, baseline: bool) -> SummaryRow:
    low, high = mean_interval(np.asarray(values, np.float64))
    return {
        "explainer": key[0], "scorer": key[1], "figure": key[2],
        "mean": number(np.mean(values)) if values else None, "low": low, "high": high,
        "done": len(values), "asked": asked, "baseline": baseline,
    }  # fmt: skip


def summary_rows(given: Iterable[Mapping[str, Any]]) -> list[SummaryRow]:
    """Rows that were summed up elsewhere, `{explainer, scorer, figure, mean, low, high, done, asked}`, as shown.

    Each random baseline comes right after what it is the baseline of.
    """
    rows = [_shown_row(row) for row in given]
    places = {key: place for place, key in enumerate(dict.fromkeys(map(_row_key, rows)))}
    return sorted(rows, key=lambda row: (places[_row_key(row)], row["baseline"]))


def _row_key(row: SummaryRow) -> Key:
    return row["explainer"], row["scorer"], row["figure"]


def _shown_row(row: Mapping[str, Any]) -> SummaryRow:
    explainer, baseline = explainer_of(str(row["explainer"]))
    return {
        "explainer": explainer,
        "scorer": str(row.get("scorer") or ""),
        "figure": str(row.get("figure") or ""),
        "mean": number(row.get("mean")),
        "low": number(row.get("low")),
        "high": number(row.get("high")),
        "done": int(row.get("done") or 0),
        "asked": int(row.get("asked") or 0),
        "baseline": baseline or row.get("baseline") is True,
    }


def mean_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap interval of the mean over latents; None, None below two values."""
    if len(values) < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return number(low), number(high)
