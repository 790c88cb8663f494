"""What a token is, seen three ways: the token itself, its form (case and space ignored) and its kind.

Patterns generalise along these levels: `" Return"` is a token of the form `return` and of the kind `Capitalised`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int32

Level = Literal["token", "form", "kind"]
LEVELS: tuple[Level, ...] = get_args(Level)

KINDS = (
    "number", "line break", "space", "word", "Capitalised", "UPPERCASE", "piece", "Piece", "quote", "opening bracket",
    "closing bracket", "punctuation", "symbol", "other",
)  # fmt: skip
"""`word`, `Capitalised` and `UPPERCASE` begin with a space; `piece` and `Piece` go on from the token before."""
_QUOTES = frozenset("\"'`‘’“”«»")
_OPENING, _CLOSING = frozenset("([{<"), frozenset(")]}>")
_PUNCTUATION = frozenset(".,;:!?…-–—")


def form_of(token: str) -> str:
    """The token without surrounding space and in one case; white space alone stays as it is."""
    return token.strip().casefold() or token


def kind_of(token: str) -> str:
    """One of `KINDS`."""
    core = token.strip()
    if not core:
        return "line break" if "\n" in token or "\r" in token else "space"
    if core.startswith("<|") or core.startswith("\\x"):
        return "other"
    if core.isdecimal():
        return "number"
    if core.isalpha():
        return _letters(token, core)
    if all(not char.isalnum() for char in core):
        return _mark(core)
    return "other"


def _letters(token: str, core: str) -> str:
    if not token[0].isspace():
        return "Piece" if core[0].isupper() else "piece"
    if len(core) > 1 and core.isupper():
        return "UPPERCASE"
    return "Capitalised" if core[0].isupper() else "word"


def _mark(core: str) -> str:
    for kind, chars in (
        ("quote", _QUOTES),
        ("opening bracket", _OPENING),
        ("closing bracket", _CLOSING),
        ("punctuation", _PUNCTUATION),
    ):
        if all(char in chars for char in core):
            return kind
    return "symbol"


class TokenTable:
    """Level ids of every token id of a vocabulary. One more id at each level stands for "before the context"."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = list(strings)
        n = len(self.strings)
        self._names: dict[Level, list[str]] = {"token": self.strings, "form": [], "kind": list(KINDS)}
        self._ids: dict[Level, dict[str, int]] = {"token": {}, "form": {}, "kind": {k: i for i, k in enumerate(KINDS)}}
        forms, kinds = np.empty(n + 1, np.int32), np.empty(n + 1, np.int32)
        seen = self._ids["form"]
        for i, token in enumerate(self.strings):
            self._ids["token"].setdefault(token, i)
            forms[i] = seen.setdefault(form_of(token), len(seen))
            kinds[i] = self._ids["kind"][kind_of(token)]
        self._names["form"] = list(seen)
        forms[n], kinds[n] = len(seen), len(KINDS)
        self._of: dict[Level, np.ndarray] = {"token": np.arange(n + 1, dtype=np.int32), "form": forms, "kind": kinds}

    @property
    def outside(self) -> int:
        """The token id that stands for positions before a context."""
        return len(self.strings)

    def size(self, level: Level) -> int:
        """How many ids the level has, the one for "before the context" included."""
        return len(self._names[level]) + 1

    def ids(self, level: Level) -> Int32[np.ndarray, " vocab"]:
        """Level id of every token id."""
        return self._of[level]

    def name(self, level: Level, id: int) -> str:
        """The text of a level id; empty for "before the context"."""
        names = self._names[level]
        return names[id] if id < len(names) else ""

    def find(self, level: Level, name: str) -> int | None:
        """The level id of a text, or None where the vocabulary has none."""
        if not name:
            return len(self._names[level])
        return self._ids[level].get(name)
