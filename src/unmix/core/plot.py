"""Plots as SVG text, in a few lines and without a library: points or lines, straight axes, a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 28, 42
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's: told apart by colour-blind readers."""


@dataclass(frozen=True)
class Series:
    """Points of one colour, joined where `line` is set."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = False
    labels: Sequence[str] = ()
    """Shown by browsers when the pointer rests on a point."""
    marks: Sequence[int] = ()
    """How each point is drawn: 0 (the default) as a disc, 1 as a ring, others as a cross."""
    through: Sequence[tuple[float, float]] = ()
    """Points of a thin line behind them."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False


def draw(panels: Sequence[Panel], title: str, note: str = "") -> str:
    """The panels side by side, at most two in a row, as one SVG document that a page may hold inline.

    `note` stands right of the legend.
    """
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(s.name for panel in panels for s in panel.series if s.name))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width, height = columns * WIDTH, rows * HEIGHT + (24 if names else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="11"><title>{escape(title)}</title>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    ]
    for i, panel in enumerate(panels):
        x, y = i % columns * WIDTH, i // columns * HEIGHT
        parts.append(f'<g transform="translate({x},{y})">{_panel(panel, colours)}</g>')
    for i, name in enumerate(names):
        x = LEFT + i * 110
        parts.append(f'<circle cx="{x}" cy="{height - 12}" r="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 8}" y="{height - 8}" fill="#222222">{escape(name)}</text>')
    if names and note:
        parts.append(
            f'<text x="{width - RIGHT}" y="{height - 8}" text-anchor="end" fill="#555555">{escape(note)}</text>'
        )
    return "".join(parts) + "</svg>\n"


def _panel(panel: Panel, colours: dict[str, str]) -> str:
    points = [p for s in panel.series for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts = [f'<text x="{middle:g}" y="16" text-anchor="middle" font-weight="bold">{escape(panel.title)}</text>']
    if not points:
        return parts[0] + f'<text x="{middle:g}" y="{HEIGHT / 2:g}" text-anchor="middle">no figures</text>'
    log_x = panel.log_x and min(p[0] for p in points) > 0
    across = _Axis([p[0] for p in points], LEFT, WIDTH - RIGHT, log_x)
    up = _Axis([p[1] for p in points], HEIGHT - BOTTOM, TOP, False)
    for value in across.ticks():
        x = across.at(value)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_number(value)}</text>')
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    parts.append(f'<text x="{middle:g}" y="{HEIGHT - 10}" text-anchor="middle">{escape(panel.x)}</text>')
    parts.append(
        f'<text transform="translate(13,{(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.y)}</text>"
    )
    parts += [_series(series, colours.get(series.name, COLOURS[0]), across, up) for series in panel.series]
    return "".join(parts)


def _series(series: Series, colour: str, across: _Axis, up: _Axis) -> str:
    kept = [
        (
            across.at(x),
            up.at(y),
            series.labels[i] if i < len(series.labels) else "",
            series.marks[i] if i < len(series.marks) else 0,
        )
        for i, (x, y) in enumerate(series.points)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if series.line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in kept)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    behind = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in series.through)
    parts = [f'<polyline points="{behind}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>'] if behind else []
    for x, y, label, mark in kept:
        parts.append(_mark(mark, x, y, colour, f"<title>{escape(label)}</title>"))
    return "".join(parts)


def _mark(kind: int, x: float, y: float, colour: str, title: str) -> str:
    if kind > 1:
        cross = f"M{x - 4:.1f},{y:.1f}h8M{x:.1f},{y - 4:.1f}v8"
        return f'<path d="{cross}" stroke="{colour}" stroke-width="1.6">{title}</path>'
    look = f'fill="{colour}" fill-opacity="0.75"' if kind == 0 else f'fill="none" stroke="{colour}" stroke-width="1.6"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}>{title}</circle>'


class _Axis:
    """Values to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = self._on(min(values)), self._on(max(values))
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.low, self.high = low - room, high + room

    def at(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (self._on(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values; on a logarithmic axis 1, 2 and 5 of each power of ten, more where those are few."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            found: list[float] = []
            for steps in ((1, 2, 5), (1, 2, 3, 5, 7)):
                values = [m * 10.0**p for p in powers for m in steps]
                found = [value for value in values if self.low <= math.log10(value) <= self.high]
                if len(found) > 3:
                    break
            return found
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]

    def _on(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:g}" if abs(value) < 1000 else f"{value / 1000:g}k"
