"""A foreign config read key by key: every complaint says where, what and what is allowed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from unmix.core.errors import FormatError
from unmix.formats.place import Place
from unmix.formats.settings import Settings


def settings(folder: Path, **tree: Any) -> Settings:
    return Settings(Place(folder, shown="here"), "cfg.json", tree)


def test_values_of_each_kind(tmp_path: Path) -> None:
    s = settings(tmp_path, k=16.0, eps=1e-5, skip=True, name="x", meta={"n": 3}, none=None)
    assert (s.size("k"), s.number("eps"), s.flag("skip"), s.text("name")) == (16, 1e-5, True, "x")
    assert s.object("meta").size("n") == 3
    assert s.object("absent").tree == {}
    assert s.choice("name", "x", "y") == "x"
    assert (s.size("none", 7), s.flag("absent", default=False), s.text("absent", "z")) == (7, False, "z")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.size("k"), "k is 2.5, expected a whole number above 0"),
        (lambda s: s.size("absent"), "absent is missing, expected a whole number above 0"),
        (lambda s: s.size("flag"), "flag is true, expected a whole number above 0"),
        (lambda s: s.number("big"), "big is NaN, expected a number"),
        (lambda s: s.number("k", above=3), "k is 2.5, expected a number above 3"),
        (lambda s: s.flag("k"), "k is 2.5, expected true or false"),
        (lambda s: s.text("k"), "k is 2.5, expected a string"),
        (lambda s: s.object("k"), "k is 2.5, expected an object"),
        (lambda s: s.choice("kind", "topk", "relu"), "kind is 'topp'. Did you mean 'topk'?"),
        (lambda s: s.object("meta").size("n"), 'meta.n is "x", expected a whole number above 0'),
    ],
)
def test_wrong_values(tmp_path: Path, call: Any, message: str) -> None:
    s = settings(tmp_path, k=2.5, flag=True, big=float("nan"), kind="topp", meta={"n": "x"})
    with pytest.raises(FormatError) as caught:
        call(s)
    assert str(caught.value) == f"here: cfg.json: {message}"


def test_keys_nobody_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    s = settings(tmp_path, k=1, lr=0.1, mystery=2)
    s.size("k")
    s.ignore("lr", "never_there")
    assert s.unread() == ["mystery"]
    with caplog.at_level(logging.WARNING, logger="unmix"):
        s.warn_unread()
    assert caplog.messages == ["here: cfg.json: keys kept but not understood: mystery"]
