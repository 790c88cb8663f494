"""Plots of an index as SVG files, coders side by side over the same axes: frequencies, activations, places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from unmix.core.atomic import write_text
from unmix.index.figures import Figures
from unmix.index.rankings import frequency_histogram, rank
from unmix.index.reader import LatentIndex
from unmix.index.statistics import PLACE_BINS

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 44
HEAD, FOOT = 34, 22
COLUMNS = 3
DOTS = 2500
"""Latents drawn in a scatter at most: evenly many of all ids."""
DENSE = 0.1

STYLE = """
svg{--paper:#fff;--ink:#23211d;--soft:#625d53;--rule:#e5e1d8;--one:#0072b2;--two:#d55e00;--three:#009e73;
font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){svg{--paper:#181714;--ink:#e9e4d9;--soft:#aaa395;--rule:#34312b;
--one:#56b4e9;--two:#f0954a;--three:#3ec9a0}}
.paper{fill:var(--paper)} text{fill:var(--soft)} .head{fill:var(--ink);font-size:14px;font-weight:600}
.name{fill:var(--ink);font-weight:600} .end{text-anchor:end} .mid{text-anchor:middle} .rule{stroke:var(--rule)}
.axis{stroke:var(--soft)} .bar{fill:var(--one)} .dot{fill:var(--one);fill-opacity:.45}
.dense{fill:var(--two);fill-opacity:.8} .single{fill:var(--three);fill-opacity:.7}
.mark{stroke:var(--two);stroke-dasharray:4 3;stroke-width:1.4} text.mark{fill:var(--two);stroke:none}
"""


@dataclass(frozen=True)
class Axis:
    """Values `low` to `high` along `start` to `end` pixels, with `(value, text)` ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[tuple[float, str]]

    def at(self, value: float) -> float:
        """Where a value lies, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def write_plots(index: LatentIndex, folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """`frequency.svg`, `activation.svg` and `places.svg` of some coders (None: all) in `folder`, made where needed."""
    chosen = {name: index.coder(name).figures for name in names or index.names}
    drawn = {"frequency": frequencies, "activation": activations, "places": places}
    paths = [folder / f"{name}.svg" for name in drawn]
    for path, draw in zip(paths, drawn.values(), strict=True):
        write_text(path, draw(chosen))
    return paths


def frequencies(coders: dict[str, Figures]) -> str:
    """Histograms of log10 frequency, dead latents told apart, the median of the alive ones marked."""
    edges, counts = frequency_histogram(list(coders.values()))
    tallest = max(1, *(int(one.max()) for one in counts))

    def panel(number: int, figures: Figures) -> str:
        across = _powers(float(edges[0]), 0.0, LEFT, WIDTH - RIGHT)
        up = _linear(tallest, HEIGHT - BOTTOM, TOP)
        alive = figures.frequency[figures.alive]
        dead = figures.alive.size - len(alive)
        marks = (
            f'<text class="end" x="{WIDTH - RIGHT}" y="16">{_count(dead)} dead of {_count(figures.alive.size)}</text>'
        )
        if len(alive):
            middle = float(np.median(alive))
            x = across.at(math.log10(middle))
            side = ("end", -5) if x > WIDTH / 2 else ("start", 5)
            marks += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            at = f'text-anchor="{side[0]}" x="{x + side[1]:.1f}" y="{TOP + 9}"'
            marks += f'<text class="mark" {at}>median {_share(middle)}</text>'
        return (
            _axes(across, up, "share of positions on which a latent fires", "latents")
            + _bars(edges, counts[number], across, up)
            + marks
        )

    return _page("How often latents fire", coders, panel)


def activations(coders: dict[str, Figures]) -> str:
    """Mean against largest |activation| of each latent, dense and single-token latents in colours of their own."""
    spread = [_extremes(figures) for figures in coders.values()]
    low_x, high_x = min(s[0] for s in spread), max(s[1] for s in spread)
    low_y, high_y = min(s[2] for s in spread), max(s[3] for s in spread)

    def panel(number: int, figures: Figures) -> str:
        across = _powers(low_x, high_x, LEFT, WIDTH - RIGHT)
        up = _powers(low_y, high_y, HEIGHT - BOTTOM, TOP)
        alive = np.flatnonzero(figures.alive & (figures.strength > 0))
        shown = alive[:: max(-(-len(alive) // DOTS), 1)]
        parts = [_axes(across, up, "largest |activation|", "mean |activation|")]
        kinds = np.where(figures.single_token_strong[shown], 2, np.where(figures.frequency[shown] > DENSE, 1, 0))
        mean = figures.strength / np.maximum(figures.firings, 1)
        for kind, name in enumerate(("dot", "dense", "single")):
            some = shown[kinds == kind]
            points = zip(np.log10(figures.max[some]).tolist(), np.log10(mean[some]).tolist(), strict=True)
            dots = [f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="1.8"/>' for x, y in points]
            parts.append(f'<g class="{name}">{"".join(dots)}</g>')
        note = _count(len(shown)) + (f" of {_count(len(alive))}" if len(shown) < len(alive) else "") + " alive latents"
        return "".join(parts) + f'<text class="end" x="{WIDTH - RIGHT}" y="16">{note}</text>'

    keys = (
        ("dot", "latent"),
        ("dense", f"fires on more than {100 * DENSE:g} % of positions"),
        ("single", "90 % of its strength on one token"),
    )
    return _page("How strongly latents fire", coders, panel, keys)


def places(coders: dict[str, Figures]) -> str:
    """By sixteenth of the context: how many latents fire there, and how many fire there above all."""
    rates: list[Float64[np.ndarray, " bins"]] = []
    for figures in coders.values():
        used = np.flatnonzero(figures.place_totals)
        used = used if len(used) else np.array([0])
        fired = np.asarray(figures.places, np.int64).sum(axis=0)
        rates.append(fired[used] / np.maximum(figures.place_totals[used], 1))
    tallest = max(float(rate.max()) for rate in rates)

    tied = [_tied(figures)[: len(rate)] for figures, rate in zip(coders.values(), rates, strict=True)]
    most = max(1, *(int(one.max()) for one in tied))

    def across(bins: int) -> tuple[Axis, str]:
        ticks = [(0.0, "start"), (bins / 2, "middle"), (float(bins), "end")]
        named = "place in the context" + (f" ({bins} equal parts)" if bins == PLACE_BINS else "")
        return Axis(0, bins, LEFT, WIDTH - RIGHT, ticks), named

    def level(number: int, figures: Figures) -> str:
        rate = rates[number]
        axis, named = across(len(rate))
        up = _linear(tallest or 1.0, HEIGHT - BOTTOM, TOP)
        note = f'<text class="end" x="{WIDTH - RIGHT}" y="16">mean {rate.mean():.4g}</text>'
        edges = np.arange(len(rate) + 1, dtype=np.float64)
        return _axes(axis, up, named, "latents that fire (L0)") + _bars(edges, rate, axis, up) + note

    def drawn_to(number: int, figures: Figures) -> str:
        counts = tied[number]
        axis, named = across(len(counts))
        up = _linear(most, HEIGHT - BOTTOM, TOP)
        said = f"{_count(int(counts.sum()))} latents drawn to a place"
        note = f'<text class="end" x="{WIDTH - RIGHT}" y="16">{said}</text>'
        edges = np.arange(len(counts) + 1, dtype=np.float64)
        return _axes(axis, up, named, "latents drawn here") + _bars(edges, counts, axis, up) + note

    return _page("Where in the context latents fire", coders, level, more=drawn_to)


def _tied(figures: Figures) -> Int64[np.ndarray, " 16"]:
    """Latents whose places chance does not explain, by the place that they prefer most, of those with half a bit."""
    found = rank(figures, "place")
    drawn = found.latents[found.values >= 0.5]
    lift = figures.places[drawn] / np.maximum(figures.place_totals, 1)
    return np.bincount(lift.argmax(axis=1), minlength=PLACE_BINS) if len(drawn) else np.zeros(PLACE_BINS, np.int64)


def _extremes(figures: Figures) -> tuple[float, float, float, float]:
    alive = figures.alive & (figures.strength > 0)
    if not alive.any():
        return 0.0, 1.0, 0.0, 1.0
    largest, mean = np.log10(figures.max[alive]), np.log10((figures.strength / np.maximum(figures.firings, 1))[alive])
    return float(largest.min()), float(largest.max()), float(mean.min()), float(mean.max())


def _page(
    title: str,
    coders: dict[str, Figures],
    panel: Callable[[int, Figures], str],
    keys: Sequence[tuple[str, str]] = (),
    more: Callable[[int, Figures], str] | None = None,
) -> str:
    """A panel of each coder, or two (`more`, in rows of their own), and what the colours mean."""
    columns = min(COLUMNS, len(coders))
    rows = -(-len(coders) // columns)
    legend = _legend(keys, columns * WIDTH)
    below = HEAD + rows * HEIGHT * (2 if more else 1)
    width, height = columns * WIDTH, below + len(legend) * FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>'
        f'<text class="head" x="16" y="23">{escape(title)}</text>'
    ]
    for set_, draw in enumerate([panel, more] if more else [panel]):
        for number, (name, figures) in enumerate(coders.items()):
            x, y = number % columns * WIDTH, HEAD + (set_ * rows + number // columns) * HEIGHT
            shown = "".join(c if c.isprintable() else "\ufffd" for c in name)
            shown = shown if len(shown) < 28 else f"{shown[:26]}…"
            label = f'<text class="name" x="{LEFT}" y="16">{escape(shown)}</text>'
            parts.append(f'<g transform="translate({x},{y})">{label}{draw(number, figures)}</g>')
    parts += [f'<g transform="translate(0,{below + i * FOOT})">{line}</g>' for i, line in enumerate(legend)]
    return "".join(parts) + "</svg>\n"


def _legend(keys: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Lines of dots and what they mean, no wider than the page."""
    lines: list[str] = []
    x = width
    for kind, text in keys:
        wide = 26 + 6 * len(text)
        if x + wide > width:
            lines.append("")
            x = LEFT
        dot = f'<g class="{kind}"><circle cx="{x}" cy="10" r="3.5"/></g>'
        lines[-1] += dot + f'<text x="{x + 8}" y="14">{escape(text)}</text>'
        x += wide
    return lines


def _axes(across: Axis, up: Axis, x: str, y: str) -> str:
    middle, bottom = (across.start + across.end) / 2, up.start
    parts = [
        f'<line class="rule" x1="{across.start}" x2="{across.end}" y1="{up.at(v):.1f}" y2="{up.at(v):.1f}"/>'
        f'<text class="end" x="{across.start - 6}" y="{up.at(v) + 4:.1f}">{text}</text>'
        for v, text in up.ticks
    ]
    for value, text in across.ticks:
        at = across.at(value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="mid" x="{at:.1f}" y="{bottom + 16}">{text}</text>')
    parts.append(f'<line class="axis" x1="{across.start}" x2="{across.end}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="mid" x="{middle:g}" y="{bottom + 33}">{escape(x)}</text>')
    parts.append(
        f'<text class="mid" transform="translate(13,{(up.start + up.end) / 2:g}) rotate(-90)">{escape(y)}</text>'
    )
    return "".join(parts)


def _bars(
    edges: Float64[np.ndarray, " edges"], heights: Float64[np.ndarray, " bins"] | Int64[np.ndarray, " bins"],
    across: Axis, up: Axis,
) -> str:  # fmt: skip
    bars: list[str] = []
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        if height:
            x, top = across.at(float(left)), up.at(float(height))
            wide = across.at(float(right)) - x - 1
            bars.append(f'<rect x="{x + 0.5:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{up.start - top:.1f}"/>')
    return f'<g class="bar">{"".join(bars)}</g>'


def _powers(low: float, high: float, start: float, end: float) -> Axis:
    """An axis of logarithms; 1, 2 and 5 of each power of ten where there are few powers."""
    if high - low < 0.5:
        low, high = low - 0.25, high + 0.25
    room = 0.03 * (high - low)
    low, high = low - room, high + room
    powers = range(math.floor(low), math.ceil(high) + 1)
    step = max(1, math.ceil((high - low) / 6))
    steps = (1, 2, 5) if high - low < 2 else (1,)
    values = [(p + math.log10(m), m * 10.0**p) for p in powers if p % step == 0 for m in steps]
    return Axis(low, high, start, end, [(at, _power(v, steps)) for at, v in values if low <= at <= high])


def _power(value: float, steps: tuple[int, ...]) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    if len(steps) > 1:
        return f"{value:.0e}"
    small = str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{small}"


def _linear(high: float, start: float, end: float) -> Axis:
    raw = high / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return Axis(
        0, high * 1.08, start, end, [(i * step, _count(i * step)) for i in range(math.floor(high * 1.08 / step) + 1)]
    )


def _count(value: float) -> str:
    return (
        f"{value / 1e6:g}M" if value >= 1e6 and value % 1e4 == 0 else f"{value:,.0f}" if value >= 100 else f"{value:g}"
    )


def _share(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.1e}"
