"""Windows that show a difference: where a latent is strongest on the side that has more of it."""

from __future__ import annotations

from typing import Any

from unmix.index.differences.sides import ROLE, Side
from unmix.index.windows import Window


def witnesses(side: Side, latent: int, n: int) -> list[Window]:
    """The strongest window of each of `n` different documents, strongest first; fewer where there are fewer."""
    place, asked = side.where, n
    role = place.value if place is not None and place.slicing == ROLE else None
    where = {place.slicing: place.value} if place is not None and place.slicing != ROLE else None
    while True:
        drawn = side.coder[latent].windows("top", asked, role, where=where)
        first_of = {window.document: window for window in reversed(drawn)}
        if len(first_of) >= n or len(drawn) < asked:
            return [window for window in drawn if first_of[window.document] is window][:n]
        asked *= 4


def window_facts(window: Window) -> dict[str, Any]:
    """A window as plain values."""
    return {
        "document": window.document, "position": window.position, "peak": window.peak, "peak_at": window.peak_at,
        "tokens": window.tokens.tolist(), "strings": window.strings, "values": [float(v) for v in window.values],
    }  # fmt: skip
