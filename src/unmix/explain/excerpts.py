"""Windows as text for a language model, and its replies as values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from unmix.explain.results import LatentError
from unmix.explain.windows import View
from unmix.index.windows import Window

OPEN, CLOSE = "[[", "]]"
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)


def window_strings(window: Window, view: View) -> list[str]:
    """Display strings of a window's tokens."""
    return window.strings if window.strings is not None else [view.table.strings[int(t)] for t in window.tokens]


def marked_text(strings: Sequence[str], marks: Bool[np.ndarray, " n"] | None = None) -> str:
    """One line of text; neighbouring marked tokens share one pair of brackets, spaces stay outside."""
    parts: list[str] = []
    inside = False
    for i, token in enumerate(strings):
        marked = bool(marks[i]) if marks is not None else False
        if inside and not marked:
            parts.append(CLOSE)
        if marked and not inside:
            lead = token[: len(token) - len(token.lstrip(" "))]
            parts += [lead, OPEN]
            token = token[len(lead) :]
        inside = marked
        parts.append(token.replace("\r", "").replace("\n", "⏎"))
    return "".join(parts) + (CLOSE if inside else "")


def numbered(texts: Sequence[str]) -> str:
    """One text a line, numbered from 1."""
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def read_json(reply: str, wanted: Callable[[Any], Any]) -> Any:
    """The last JSON value in `reply` for which `wanted` gives something; `LatentError` `BadReply` where there is none.

    Thinking, code fences and words around it are passed over; nothing is guessed from them.
    """
    text = _THOUGHT.sub("", reply)
    decoder = json.JSONDecoder()
    found: Any = None
    place = 0
    while match := re.compile(r"[\[{]").search(text, place):
        try:
            value, place = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError:
            place = match.start() + 1
            continue
        result = wanted(value)
        found = result if result is not None else found
    if found is None:
        shown = " ".join(reply.split())[:120]
        raise LatentError("BadReply", f"the reply holds no answer in the asked form: {shown!r}")
    return found
