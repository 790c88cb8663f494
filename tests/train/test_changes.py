from __future__ import annotations

from unmix.train.changes import changed_fields


def test_a_setting_that_a_config_notes_twice_is_told_once() -> None:
    before = {"a": {"train": {"lr": 1.0}, "coder": {"training": {"train": {"lr": 1.0}}, "k": 4}}, "seed": 0}
    now = {"a": {"train": {"lr": 2.0}, "coder": {"training": {"train": {"lr": 2.0}}, "k": 5}}, "seed": 0}
    assert changed_fields(before, now) == "a.train.lr: 1.0 → 2.0; a.coder.k: 4 → 5"


def test_a_note_that_says_something_of_its_own_is_told() -> None:
    before = {"a": {"coder": {"training": {"tokens": 10}}}}
    now = {"a": {"coder": {"training": {"tokens": 20}}}}
    assert changed_fields(before, now) == "a.coder.training.tokens: 10 → 20"
    assert changed_fields(now, now) == ""
