"""Patterns: the planted rule is found, said in words, and runs."""

from __future__ import annotations

import numpy as np
import pytest

from explain.planted import CAT, DEF, DOG, NOISE, NUMBERS, RETURN, TRANSFORMER, WALK
from unmix.core.errors import DataError
from unmix.explain.explainers.ngram import NgramExplainer
from unmix.explain.grids import Grid, whole_word
from unmix.explain.patterns import Pattern, Rule, Slot
from unmix.explain.results import LatentError
from unmix.explain.rules import LearnConfig
from unmix.explain.windows import View
from unmix.explain.words import TokenTable


def rule(*slots: Slot, activation: float = 1.0) -> Rule:
    return Rule(slots=slots, activation=activation, matches=4, fired=4, gain=4, mass=0.5)


def text_and_pattern(view: View, latent: int) -> tuple[str, Pattern]:
    draft = NgramExplainer(LearnConfig()).explain(view[latent])
    return draft.text, Pattern.from_json(draft.data["pattern"])


@pytest.mark.parametrize(
    ("latent", "text"),
    [
        (CAT, '"cat" after "the"'),
        (RETURN, 'the word "return"'),
        (DEF, 'any token after "def"'),
        (TRANSFORMER, 'the word "transformer"'),
        (WALK, 'forms of "walk"'),
        (NUMBERS, "numbers"),
        (DOG, 'sometimes "Dog"'),
    ],
)
def test_the_line_says_the_planted_rule(explaining: View, latent: int, text: str) -> None:
    said, _ = text_and_pattern(explaining, latent)
    assert said.casefold() == text.casefold()


@pytest.mark.parametrize(
    ("latent", "tokens", "fires"),
    [
        (CAT, [" the", " cat", " of", " cat", " the", " Cat", "\n", "cat"], [1, 5]),
        (RETURN, ["\n", "return", " of", " Return", " dog"], [1, 3]),
        (DEF, [" def", " foo", " def", " sun", " sun"], [1, 3]),
        (TRANSFORMER, [" transfor", "mer", " ham", "mer", "mer"], [1]),
        (NUMBERS, [" 1", " cat", " 3"], [0, 2]),
    ],
)
def test_a_pattern_runs_on_new_tokens(explaining: View, latent: int, tokens: list[str], fires: list[int]) -> None:
    values = text_and_pattern(explaining, latent)[1].predict(tokens)
    assert np.flatnonzero(values).tolist() == fires
    assert values[fires] == pytest.approx(3, abs=0.25), "the mean of the planted strengths, between 2 and 4"


def test_a_pattern_survives_json(explaining: View) -> None:
    import json

    _, pattern = text_and_pattern(explaining, CAT)
    again = Pattern.from_json(json.loads(json.dumps(pattern.to_json())))
    assert again == pattern
    with pytest.raises(DataError, match="not a pattern that this version runs: version 9, expected 1"):
        Pattern.from_json({"version": 9, "rules": []})
    with pytest.raises(DataError, match="not a pattern: "):
        Pattern.from_json({"version": 1, "rules": [{"slots": []}]})


def test_nothing_learnable_is_not_made_into_a_rule_that_looks_right(explaining: View) -> None:
    try:
        _, pattern = text_and_pattern(explaining, NOISE)
    except LatentError as failure:
        assert failure.kind == "NoPattern"
    else:
        assert sum(rule.gain for rule in pattern.rules) < 0.25 * len(explaining[NOISE].postings[0])


def test_the_strongest_matching_rule_counts() -> None:
    any_cat = rule(Slot(back=0, level="form", texts=("cat",)), activation=1.0)
    the_cat = rule(
        Slot(back=0, level="form", texts=("cat",)), Slot(back=1, level="token", texts=(" the", " a")), activation=-2.0
    )
    pattern = Pattern(rules=(any_cat, the_cat))
    assert pattern.predict(["Cat", " the", " cat", " a", " cats", " a", " cat"]).tolist() == [1, 0, -2, 0, 0, 0, -2]


def test_slots_by_kind_with_gaps_and_at_the_start() -> None:
    number_two_back = rule(Slot(back=2, level="kind", texts=("number",)))
    assert Pattern(rules=(number_two_back,)).predict([" 7", "x", "y", " 1"]).tolist() == [0, 0, 1, 0]
    first = rule(Slot(back=1, level="token", texts=("",)))
    assert Pattern(rules=(first,)).run([["a", "b"], ["b", "a"]]).tolist() == [[1, 0], [1, 0]]


def test_no_rule_looks_into_another_context() -> None:
    table = TokenTable(["a", "b"])
    grid = Grid(table, np.array([[0, 0], [1, 1]]))
    places, _ = Pattern(rules=(rule(Slot(back=1, level="token", texts=("a",))),)).match(grid)
    assert places.tolist() == grid.places(np.array([0]), np.array([1])).tolist()


def test_masked_places_never_match() -> None:
    table = TokenTable(["a", "b"])
    grid = Grid(table, np.array([[0, 0, 0]]), np.array([[False, True, True]]))
    places, _ = Pattern(rules=(rule(Slot(back=0, level="token", texts=("a",))),)).match(grid)
    assert len(places) == grid.trials == 2


def test_ids_beyond_the_vocabulary_match_nothing() -> None:
    grid = Grid(TokenTable(["a", "b"]), np.array([[7, 1]]))
    places, _ = Pattern(rules=(rule(Slot(back=0, level="token", texts=("a", "b"))),)).match(grid)
    assert len(places) == 1


def test_a_piece_shows_its_written_word() -> None:
    table = TokenTable([" re", "tur", "n", " the", "(", "ing x"])
    grid = Grid(table, np.array([[3, 0, 1, 2, 4, 1, 5]]))
    places = grid.places(np.zeros(7, np.int64), np.arange(7))
    assert [whole_word(grid, int(p)) for p in places] == [
        "the", "return", "return", "return", "(", "turing", "turing x",
    ]  # fmt: skip


def test_empty_input() -> None:
    assert Pattern(rules=()).predict([]).shape == (0,)
    assert Pattern(rules=()).predict(["a"]).tolist() == [0]
