"""The pattern scorer: right explanations score 1, wrong ones nothing, and sampling does not flatter."""

from __future__ import annotations

import numpy as np
import pytest

from explain.planted import CAT, CONTEXT, DEF, DOG, ID, RETURN, UNSCORED
from unmix.explain.explainers.ngram import NgramExplainer
from unmix.explain.patterns import Pattern, Rule, Slot
from unmix.explain.results import Draft, Figures, LatentError
from unmix.explain.rules import LearnConfig
from unmix.explain.scorers.pattern import PatternConfig, PatternScorer
from unmix.explain.windows import View
from unmix.index.reader import LatentIndex


def pattern_of(*texts: str, after: str | None = None, activation: float = 3.0) -> Draft:
    slots = [Slot(back=0, level="token", texts=texts)]
    if after:
        slots.append(Slot(back=1, level="token", texts=(after,)))
    rule = Rule(slots=tuple(slots), activation=activation, matches=1, fired=1, gain=1, mass=1.0)
    return Draft("by hand", {"pattern": Pattern(rules=(rule,)).to_json()})


def scored(view: View, latent: int, draft: Draft, config: PatternConfig | None = None) -> Figures:
    return PatternScorer(config or PatternConfig()).score(view[latent], draft)


@pytest.mark.parametrize("latent", [CAT, RETURN, DEF])
def test_the_right_explanation_scores_one(explaining: View, scoring: View, latent: int) -> None:
    draft = NgramExplainer(LearnConfig()).explain(explaining[latent])
    figures = scored(scoring, latent, draft).values
    assert figures["f1"] == figures["precision"] == figures["recall"] == figures["mass_recall"] == 1.0
    assert figures["pearson"] == pytest.approx(0.98, abs=0.02), "strengths vary between 2 and 4 at random"


def test_another_latents_explanation_scores_nothing(explaining: View, scoring: View) -> None:
    draft = NgramExplainer(LearnConfig()).explain(explaining[RETURN])
    figures = scored(scoring, CAT, draft).values
    assert (figures["f1"], figures["precision"], figures["recall"]) == (0, 0, 0)
    assert figures["pearson"] == pytest.approx(0, abs=0.05)


def test_figures_by_counting(scoring: View, index: LatentIndex) -> None:
    tokens = np.asarray(index.tokens[scoring.contexts])[:, 1:]
    dogs = int((tokens == ID[" dog"]).sum())
    values = np.zeros(len(scoring.contexts) * CONTEXT)
    positions, strengths = scoring[DOG].postings
    fired = np.asarray(index.tokens).reshape(-1)[positions]
    hits = int((fired == ID[" dog"]).sum())
    figures = scored(scoring, DOG, pattern_of(" dog"))
    assert figures.values["precision"] == pytest.approx(hits / dogs)
    assert figures.values["recall"] == pytest.approx(hits / len(positions))
    assert figures.values["f1"] == pytest.approx(2 * hits / (dogs + len(positions)))
    rows = np.searchsorted(scoring.contexts, positions // CONTEXT)
    values[rows * CONTEXT + positions % CONTEXT] = strengths
    true = values.reshape(-1, CONTEXT)[:, 1:].reshape(-1)
    assert figures.values["pearson"] == pytest.approx(np.corrcoef(true, (tokens == ID[" dog"]).reshape(-1))[0, 1])
    assert figures.counted == {"contexts": 150, "tokens": 150 * 47, "firings": len(positions), "weighted": False}


def test_a_broad_pattern_is_imprecise_although_windows_around_firings_would_flatter_it(scoring: View) -> None:
    figures = scored(scoring, CAT, pattern_of(" cat", " Cat", "cat")).values
    assert figures["recall"] == 1.0
    precision = figures["precision"]
    assert precision is not None
    assert precision < 0.6


def test_a_weighted_sample_estimates_the_whole(index: LatentIndex, scoring: View) -> None:
    draft = pattern_of(" cat", " Cat", "cat")
    whole = scored(scoring, CAT, draft).values
    found = []
    for seed in range(60):
        view = View(index, index.coder(), ("score",), seed=seed, tokens=60 * CONTEXT)
        figures = scored(view, CAT, draft, PatternConfig(own=30, seed=seed))
        assert figures.counted["weighted"]
        found.append([figures.values["precision"], figures.values["recall"], figures.values["pearson"]])
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    truth = np.array([whole["precision"], whole["recall"], whole["pearson"]], float)
    assert (np.abs(mean - truth) < 4 * error + 0.01).all()
    assert error[0] < 0.02


def test_weights_add_up_to_the_contexts(index: LatentIndex) -> None:
    view = View(index, index.coder(), ("score",), tokens=40 * CONTEXT)
    contexts, _, weights = PatternScorer(PatternConfig(own=10)).sample(view[CAT])
    assert weights.sum() == pytest.approx(150)
    assert len(np.unique(contexts)) == len(contexts)


def test_without_firings_there_is_no_score(scoring: View) -> None:
    with pytest.raises(LatentError, match="latent 7 never fires in contexts of the role score"):
        scored(scoring, UNSCORED, pattern_of(" sea"))


def test_a_pattern_that_never_matches_has_no_precision(scoring: View) -> None:
    figures = scored(scoring, CAT, pattern_of(" unheard")).values
    assert figures == {"f1": 0.0, "pearson": None, "precision": None, "recall": 0.0, "mass_recall": 0.0}
