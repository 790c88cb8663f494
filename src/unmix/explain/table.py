"""What the ledger says: scores by explainer and scorer, with intervals, coverage and the random baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unmix.core.seeds import derive
from unmix.explain.ledger import Ledger
from unmix.explain.rows import Explanation, Score
from unmix.explain.scorers import SCORERS
from unmix.index.reader import LatentIndex

RESAMPLES = 2000
RANDOM = "random:"


def summary(ledger: Ledger, index: LatentIndex | None = None, seed: int = 0) -> dict[str, Any]:
    """Everything in the ledger (or what belongs to one index), as plain numbers.

    Returns `{"explainers": [...], "rows": [...]}`. An entry of `explainers` counts asked, done, failed and why. A row
    stands for coder × explainer × scorer × figure: `mean` and `median` over latents with bootstrap 95 % intervals
    (`low`, `high`, `median_low`, `median_high`), and beside them the coverage: of `asked` explanations `done` have
    the figure, `failed` do not, `why` by class (`undefined`: a ratio 0/0; `not scored`: no score was asked for).
    `baseline` is the mean of the same figure for random explanations of the same explainer, None where there is none.
    """
    where = {"index_hash": index.hash} if index is not None else {}
    groups: dict[tuple[str, ...], list[Explanation]] = {}
    for explanation in ledger.explanations(**where):
        e = explanation
        groups.setdefault((e.coder, e.method, e.config_hash, e.index_hash), []).append(e)
    scores: dict[int, list[Score]] = {}
    for one in ledger.scores():
        scores.setdefault(one.explanation_id, []).append(one)
    explainers = [_explainer(key, group) for key, group in groups.items()]
    rows = [row for key, group in groups.items() for row in _rows(key, group, scores, seed)]
    means = {(r["coder"], r["index"], r["scorer"], r["figure"], r["explainer"]): r["mean"] for r in rows}
    for r in rows:
        r["baseline"] = means.get((r["coder"], r["index"], r["scorer"], r["figure"], RANDOM + r["explainer"]))
    return {"explainers": explainers, "rows": rows}


def _explainer(key: tuple[str, ...], group: Sequence[Explanation]) -> dict[str, Any]:
    failed = Counter(e.error or "?" for e in group if e.status == "failed")
    costs = [e.cost for e in group if e.cost is not None]
    return {
        "coder": key[0], "explainer": key[1], "config": key[2], "index": key[3],
        "asked": len(group), "done": sum(e.status == "done" for e in group), "failed": sum(failed.values()),
        "why": dict(sorted(failed.items())),
        "prompt_tokens": sum(e.prompt_tokens for e in group),
        "completion_tokens": sum(e.completion_tokens for e in group), "cost": sum(costs) if costs else None,
    }  # fmt: skip


def _rows(
    key: tuple[str, ...], group: Sequence[Explanation], scores: dict[int, list[Score]], seed: int
) -> list[dict[str, Any]]:
    kinds = dict.fromkeys((s.method, s.config_hash) for e in group for s in scores.get(e.id, []))
    rows: list[dict[str, Any]] = []
    for method, config in kinds:
        found = {
            e.id: [s for s in scores.get(e.id, []) if (s.method, s.config_hash) == (method, config)] for e in group
        }
        for figure in _figures(method, [s for some in found.values() for s in some]):
            values, why = list[float](), Counter[str]()
            for explanation in group:
                reason, value = _value(explanation, found[explanation.id], figure)
                if value is None:
                    why[reason] += 1
                else:
                    values.append(value)
            if values:
                label = {"coder": key[0], "explainer": key[1], "config": key[2], "index": key[3], "scorer": method}
                counted = {"asked": len(group), "done": len(values), "failed": sum(why.values()), "why": dict(why)}
                rows.append({**label, "scorer_config": config, "figure": figure, **spread_of(values, seed), **counted})
    return rows


def _figures(method: str, scores: Sequence[Score]) -> list[str]:
    """The scorer's figures in its own order; as they come for a scorer that is not installed here."""
    present = dict.fromkeys(name for score in scores for name in score.figures)
    order: tuple[str, ...] = SCORERS.get(method).figures if method in SCORERS.names() else ()
    return [*[name for name in order if name in present], *[name for name in present if name not in order]]


def _value(explanation: Explanation, scores: Sequence[Score], figure: str) -> tuple[str, float | None]:
    """The mean over samples, or why there is none."""
    if explanation.status != "done":
        return explanation.error or explanation.status, None
    if not scores:
        return "not scored", None
    values = [s.figures[figure] for s in scores if s.status == "done" and s.figures.get(figure) is not None]
    if values:
        return "", float(np.mean([value for value in values if value is not None]))
    failed = next((s for s in scores if s.status != "done"), None)
    return (failed.error or failed.status) if failed else "undefined", None


def spread_of(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Mean and median with percentile bootstrap 95 % intervals over latents (2000 resamples, seeded)."""
    array = np.array(values, np.float64)
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    step = max(1, 2_000_000 // len(array))
    means, medians = list[np.ndarray](), list[np.ndarray]()
    for start in range(0, RESAMPLES, step):
        drawn = array[rng.integers(len(array), size=(min(step, RESAMPLES - start), len(array)))]
        means.append(drawn.mean(axis=1))
        medians.append(np.median(drawn, axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    median_low, median_high = np.quantile(np.concatenate(medians), (0.025, 0.975))
    return {
        "mean": float(array.mean()), "low": float(low), "high": float(high), "median": float(np.median(array)),
        "median_low": float(median_low), "median_high": float(median_high),
    }  # fmt: skip
