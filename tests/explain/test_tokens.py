"""Token statistics: shares that add up, a line that is true, a pattern that runs."""

from __future__ import annotations

import re

import numpy as np
import pytest

from explain.planted import CAT, DEAD, NUMBERS, RETURN, WALK
from unmix.explain.explainers.tokens import TokensConfig, TokensExplainer, sentence
from unmix.explain.patterns import Pattern
from unmix.explain.results import LatentError
from unmix.explain.windows import View


def test_the_line_and_the_shares_are_those_of_the_planted_latent(explaining: View) -> None:
    draft = TokensExplainer(TokensConfig()).explain(explaining[CAT])
    assert re.fullmatch(r'"[cC]at" \(\d\d% of activation\), nearly always after "the"', draft.text)
    shares = draft.data["shares"]
    assert shares["previous"] == [("the", 1.0)]
    assert sum(share for _, share in shares["tokens"]) == pytest.approx(1, abs=1e-3)
    assert sum(share for _, share in shares["kinds"]) == pytest.approx(1, abs=1e-3)
    assert sum(shares["places"]) == pytest.approx(1, abs=1e-3)


def test_forms_of_a_word_are_one_family(explaining: View) -> None:
    said = TokensExplainer(TokensConfig()).explain(explaining[WALK]).text
    assert re.fullmatch(r'"walk" and its forms \(9\d% of activation\)', said)


def test_the_pattern_predicts_each_tokens_mean(explaining: View) -> None:
    pattern = Pattern.from_json(TokensExplainer(TokensConfig()).explain(explaining[RETURN]).data["pattern"])
    values = pattern.predict([" return", " cat", "return", "Return"])
    assert (values != 0).tolist() == [True, False, True, False]
    assert values[[0, 2]] == pytest.approx(3, abs=0.25)


def test_a_latent_that_never_fires_is_a_failure(explaining: View) -> None:
    with pytest.raises(LatentError, match="latent 4 never fires in contexts of the role train or explain") as caught:
        TokensExplainer(TokensConfig()).explain(explaining[DEAD])
    assert caught.value.kind == "NoFirings"


def test_lines_for_kinds_and_for_nothing_in_particular() -> None:
    flat = [[[f"w{i}"], 0.05] for i in range(10)]
    tables = {"families": flat, "kinds": [("number", 0.9)], "previous": [], "places": [0.0], "previous_of_first": []}
    assert sentence(tables) == 'numbers (90% of activation), most of all "w0" and "w1"'
    tables |= {"kinds": [("word", 0.9)], "places": [0.8], "previous": [("of", 0.6)]}
    assert sentence(tables) == (
        'many tokens, "w0", "w1", "w2", "w3" first (20% of activation), mostly after "of", near the start of a context'
    )


def test_rules_are_counted_on_every_occurrence(explaining: View) -> None:
    pattern = Pattern.from_json(TokensExplainer(TokensConfig()).explain(explaining[NUMBERS]).data["pattern"])
    grid = explaining.grid
    for rule in pattern.rules:
        token = explaining.table.find("token", rule.slots[0].texts[0])
        assert token is not None
        assert rule.matches == rule.fired == int(np.count_nonzero(grid.level("token")[grid.counts] == token))
