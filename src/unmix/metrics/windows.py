"""A stretch of tokens shaded by how strongly one latent fires on each: a small piece of HTML that stands alone.

Used by notebooks (`_repr_html_`) and anything else that shows a window without the viewer. Every token is hostile:
it is escaped, and what would be invisible or would turn the text around is shown as its code point.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Sequence

from unmix.core.errors import ConfigError

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories without a shape of their own: controls, format marks, lone surrogates, separators."""
_HEAT, _COLD = "245,158,11", "59,130,246"
"""Amber for positive activations, blue for negative ones; translucent, so light and dark notebooks both work."""
_STRONGEST = 0.75
"""Opacity at the latent's maximum."""
_BOX = (
    "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px;line-height:1.7;"
    "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate"
)


def visible(token: str) -> str:
    """`token` with everything that hides made visible: newline ↵, tab ⇥, other marks as `‹U+202E›`."""
    return "".join(_visible(char) for char in token)


def _visible(char: str) -> str:
    if char == "\n":
        return "↵"
    if char == "\t":
        return "⇥"
    if unicodedata.category(char) in _HIDDEN:
        return f"‹U+{ord(char):04X}›"
    return char


def window_html(tokens: Sequence[str], values: Sequence[float], maximum: float, marked: int | None = None) -> str:
    """One window as an HTML `<div>` with inline styles and no scripts.

    `values` are the latent's activations, one a token; colour goes by `|value| / maximum`, the latent's maximum
    over the whole index. `marked` is the place of a token to underline. `ConfigError` where the lengths differ or
    `marked` lies outside.
    """
    if len(tokens) != len(values):
        raise ConfigError(f"window: {len(tokens)} tokens and {len(values)} values, expected one value a token")
    if marked is not None and not 0 <= marked < len(tokens):
        raise ConfigError(f"window: marked token {marked}, allowed: 0 to {len(tokens) - 1}")
    parts = [
        _token_html(token, float(value), float(maximum), place == marked)
        for place, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
    return f'<div style="{_BOX}">{"".join(parts)}</div>'


def _token_html(token: str, value: float, maximum: float, marked: bool) -> str:
    text = html.escape(visible(token))
    styles: list[str] = []
    if strength := shade(value, maximum):
        styles.append(f"background:rgba({_HEAT if value > 0 else _COLD},{strength:.2f});border-radius:2px")
    if marked:
        styles.append("text-decoration:underline;text-underline-offset:3px")
    title = "" if value == 0 else f' title="{value:.4g}"'
    if not styles and not title:
        return text
    style = f' style="{";".join(styles)}"' if styles else ""
    return f"<span{title}{style}>{text}</span>"


def shade(value: float, maximum: float) -> float:
    """Opacity of an activation's colour, 0 to 0.75; 0 where either number is not finite or `maximum` is not above 0."""
    if not (math.isfinite(value) and math.isfinite(maximum)) or maximum <= 0:
        return 0.0
    return _STRONGEST * min(abs(value) / maximum, 1.0)
