"""JSON that survives being a script, and numbers as they are shown."""

from __future__ import annotations

import json

import numpy as np

from unmix.viewer.wire import number, to_json, to_script
from viewer.makebelieve import HOSTILE, HOSTILE_TEXT


def test_hostile_strings_come_back_as_they_were() -> None:
    for text in (*HOSTILE, HOSTILE_TEXT):
        assert json.loads(to_json([text])) == [text]


def test_the_text_is_ascii_and_cannot_end_a_script() -> None:
    text = to_json([*HOSTILE, HOSTILE_TEXT, "&"])
    assert text.isascii()
    assert not set(text) & set("<>&\n\r")


def test_what_is_not_finite_is_missing() -> None:
    assert (
        to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (-float("inf"),)})
        == '{"a":null,"b":[null,1.5],"c":[null]}'
    )


def test_a_script_assigns_once() -> None:
    assert to_script("run", {"a": 1}) == '(window.__unmix=window.__unmix||{})["run"]={"a":1};\n'


def test_numbers_have_four_digits_or_are_missing() -> None:
    assert number(np.float32(1 / 3)) == 0.3333
    assert number(123456.0) == 123500.0
    assert [number(x) for x in (None, float("nan"), float("inf"), "1", object())] == [None] * 5
