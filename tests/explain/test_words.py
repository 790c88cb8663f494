"""Tokens as forms and kinds, and their names in running text."""

from __future__ import annotations

import pytest

from unmix.explain.nouns import akin, families, family_name, listed, quoted, token_name
from unmix.explain.words import KINDS, TokenTable, form_of, kind_of


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (" the", "word"), (" The", "Capitalised"), (" HTTP", "UPPERCASE"), (" I", "Capitalised"), ("ing", "piece"),
        ("Error", "Piece"), (" 42", "number"), ("\n\n", "line break"), ("    ", "space"), ('"', "quote"),
        (" (", "opening bracket"), ("])", "closing bracket"), (".", "punctuation"), (" +=", "symbol"),
        ("<|end|>", "other"), ("a1", "other"), ("\\xe2", "other"), ("", "space"),
    ],
)  # fmt: skip
def test_kinds(token: str, kind: str) -> None:
    assert kind in KINDS
    assert kind_of(token) == kind


def test_forms_ignore_case_and_space_but_keep_white_space() -> None:
    assert {form_of(t) for t in (" Return", "return", " RETURN")} == {"return"}
    assert form_of("\n") != form_of("  ")


def test_a_table_finds_what_it_names() -> None:
    table = TokenTable([" Cat", "cat", " 7"])
    assert table.ids("form").tolist() == [0, 0, 1, 2]
    assert table.find("form", "cat") == 0
    assert table.find("token", " dog") is None
    assert table.find("token", "") == table.outside == 3
    assert table.name("kind", int(table.ids("kind")[2])) == "number"
    assert [table.size(level) for level in ("token", "form", "kind")] == [4, 3, len(KINDS) + 1]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("field", "fields", True), ("Field", "field", True), ("compute", "computing", True), ("take", "taking", True),
        ("library", "libraries", True), ("they", "the", False), ("None", "non", False), ("fine", "final", False),
        ("form", "format", False), ("a", "as", False), ("x1", "x2", False), ("", "s", False),
    ],
)  # fmt: skip
def test_akin(a: str, b: str, same: bool) -> None:
    assert akin(a, b) is same


def test_families_are_ordered_by_weight_and_named() -> None:
    found = families([("field", 1.0), ("dog", 2.5), ("Fields", 2.0), ("walk", 0.1), ("walks", 0.2), ("walking", 0.1)])
    assert [(names, round(weight, 3)) for names, weight in found] == [
        (["Fields", "field"], 3.0), (["dog"], 2.5), (["walks", "walk", "walking"], 0.4),
    ]  # fmt: skip
    assert [family_name(names) for names, _ in found] == ['"Fields"/"field"', '"dog"', 'forms of "walk"']


def test_names_show_what_is_invisible() -> None:
    assert [token_name(t) for t in (" cat", "\n", "\n\n", "\n   ", "    ", "\t", " ", "")] == [
        '"cat"', "a line break", "a blank line", "a line break and an indent", "an indent of 4 spaces", "a tab",
        "a space", "the start of the text",
    ]  # fmt: skip
    assert [quoted(t) for t in ('say "x"', "a\u202eb", "'\"")] == ["'say \"x\"'", '"a‹U+202E›b"', "`'\"`"]
    assert [listed(names, "or") for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a or b",
        "a, b or c",
    ]
