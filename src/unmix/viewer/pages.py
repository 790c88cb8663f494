"""One latent's page, read from the index on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unmix.index.latent import Latent
from unmix.index.reader import CoderIndex
from unmix.index.windows import Window
from unmix.viewer.shapes import Explanation, Histogram, LatentPage, ShownWindow, TokenLogit, TokenShare, TopLogits
from unmix.viewer.wire import number

LogitPairs = Iterable[tuple[str, float]]
LogitSource = Callable[[int], Mapping[str, LogitPairs] | None]
"""`latent → {"positive": [(token, logit)], "negative": [...]}`, strongest first; None where there is nothing."""


@dataclass(frozen=True)
class PageMaker:
    """`maker(latent)` → `LatentPage`. Reads a memory map; holds no state, so any thread may call it."""

    coder: CoderIndex
    explanations: Mapping[int, list[Explanation]]
    logits: LogitSource | None = None
    windows: int = 24
    """Windows shown: half of them the strongest, half from all of the latent's range."""
    context: tuple[int, int] = (20, 8)
    """Tokens before and after the strongest one."""
    _none: list[Explanation] = field(default_factory=lambda: [])

    def __call__(self, latent: int) -> LatentPage:
        """The page of one latent; `ConfigError` where the coder has no such latent."""
        source = self.coder[latent]
        top = source.top((self.windows + 1) // 2, None, self.context)
        shown = {window.position for window in top}
        spread = source.windows("quantiles", self.windows // 2, None, self.context)
        return {
            "id": latent,
            "explanations": self.explanations.get(latent, self._none),
            "frequency": number(source.frequency),
            "max": number(source.max),
            "mean": number(source.mean),
            "histogram": activation_histogram(source),
            "tokens": token_shares(source),
            "logits": top_logits(self.logits, latent),
            "top": [shown_window(window) for window in top],
            "quantiles": [shown_window(window) for window in spread if window.position not in shown],
        }


def shown_window(window: Window) -> ShownWindow:
    """A window in its wire shape; token ids stand in where the index holds no strings."""
    strings = window.strings if window.strings is not None else [f"<{int(i)}>" for i in window.tokens]
    return {
        "tokens": list(strings),
        "values": [number(value) or 0.0 for value in window.values],
        "peak": window.peak_at,
        "role": window.role,
        "document": int(window.document),
        "position": int(window.position),
        "tenth": window.quantile,
    }


def activation_histogram(latent: Latent) -> Histogram | None:
    """Firings by strength in half octaves, cut to the bins in use; None for a latent that never fires."""
    edges, counts = latent.histogram()
    used = np.flatnonzero(counts)
    if not len(used):
        return None
    first, last = int(used[0]), int(used[-1])
    finite = [float(edge) for edge in edges[first : last + 2]]
    # The outermost bins are open; they are drawn as wide as the others.
    if finite[0] == 0.0:
        finite[0] = finite[1] / 2**0.5
    if not np.isfinite(finite[-1]):
        finite[-1] = finite[-2] * 2**0.5
    return {
        "edges": [float(f"{edge:.4g}") for edge in finite],
        "counts": [int(count) for count in counts[first : last + 1]],
        "outside": 0,
    }


def token_shares(latent: Latent) -> list[TokenShare]:
    """The tokens with the largest summed strength."""
    return [
        {
            "token": found.string if found.string is not None else f"<{found.token}>",
            "count": int(found.count),
            "mean": number(found.mean),
        }
        for found in latent.top_tokens()
    ]


def top_logits(source: LogitSource | None, latent: int) -> TopLogits | None:
    """Promoted and suppressed tokens; None where nobody knows them."""
    found: Mapping[str, Any] | None = source(latent) if source is not None else None
    if found is None:
        return None
    return {"positive": _pairs(found.get("positive", ())), "negative": _pairs(found.get("negative", ()))}


def _pairs(pairs: LogitPairs) -> list[TokenLogit]:
    return [{"token": str(token), "value": number(value)} for token, value in pairs]
