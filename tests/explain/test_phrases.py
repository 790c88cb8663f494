"""The one line that people read."""

from __future__ import annotations

import pytest

from unmix.explain.patterns import Pattern, Rule, Slot
from unmix.explain.phrases import context_phrase, sentence


def slot(back: int, *texts: str, level: str = "token") -> Slot:
    return Slot(back=back, level=level, texts=texts)  # pyright: ignore[reportArgumentType]


def rule(*slots: Slot, mass: float = 0.5, share: float = 1.0, words: tuple[tuple[str, int], ...] = ()) -> Rule:
    return Rule(slots=slots, activation=1.0, matches=100, fired=int(100 * share), gain=10, mass=mass, words=words)


def said(*rules: Rule) -> str:
    return sentence(Pattern(rules=rules))


def test_contexts_of_one_token_are_joined_and_tokens_of_one_context_too() -> None:
    assert said(rule(slot(0, " the"), slot(1, " of")), rule(slot(0, " the"), slot(1, "\n"), mass=0.3)) == (
        '"the" after "of" or a line break'
    )
    assert said(rule(slot(0, " the"), slot(1, " of")), rule(slot(0, " a"), slot(1, " of"), mass=0.3)) == (
        '"the" or "a" after "of"'
    )


@pytest.mark.parametrize(("share", "text"), [(0.9, 'the word "cat"'), (0.5, 'often "cat"'), (0.1, 'sometimes "cat"')])
def test_how_sure_a_part_is(share: float, text: str) -> None:
    assert said(rule(slot(0, " cat"), share=share)) == text


def test_a_piece_of_one_word_is_that_word_and_of_many_says_where() -> None:
    piece = slot(0, "urn")
    assert said(rule(piece, slot(1, " ret"), words=(("return", 9), ("returns", 1)))) == 'the word "return"'
    many = (("burn", 3), ("turn", 3), ("churn", 2), ("mourn", 2), ("adjourn", 2), ("urn", 2), ("spurn", 2))
    assert said(rule(piece, words=many)) == '"urn" at the end of "burn" and "turn"'


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ([slot(1, " of")], 'after "of"'),
        ([slot(1, " of"), slot(2, " one")], 'after "one of"'),
        ([slot(1, " import"), slot(3, "from")], 'after "from … import"'),
        ([slot(2, " of")], 'after "of …"'),
        ([slot(1, "number", level="kind")], "after a number"),
        ([slot(1, "number", level="kind"), slot(2, " version")], 'after "version", then a number'),
        ([slot(1, "")], "after the start of the text"),
        ([slot(1, " a", " b", " c", " d")], 'after "a", "b" or the like'),
        ([], ""),
    ],
)
def test_context_phrases(slots: list[Slot], text: str) -> None:
    assert context_phrase(slots) == text


def test_any_token() -> None:
    assert said(rule(slot(1, " def"))) == 'any token after "def"'
    assert said(rule(slot(2, " def"))) == 'the 2nd token after "def"'


def test_what_is_left_out_is_said() -> None:
    rules = [rule(slot(0, f" {word}"), mass=0.1) for word in ("cat", "dog", "sun", "moon", "tree", "lake")]
    assert said(*rules) == '"cat", "dog", "sun", "moon" and 2 more'
    assert said(rule(slot(0, " cat"), mass=0.05)).endswith(", among others")


def test_numbers_are_taken_together() -> None:
    assert said(*[rule(slot(0, str(n)), mass=0.2) for n in range(5)]) == 'numbers ("0", "1", …)'


def test_hostile_tokens_stay_on_one_line_and_visible() -> None:
    text = said(rule(slot(0, "\u202e<script>\n")))
    assert "\n" not in text
    assert "‹U+202E›" in text


def test_no_rules_no_line() -> None:
    assert said() == ""
