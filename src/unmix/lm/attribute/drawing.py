"""Circuits as SVG text, without a library: layers from the bottom up, positions from left to right."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from unmix.core.plot import Panel, Series, draw

if TYPE_CHECKING:
    from unmix.lm.attribute.circuits import Circuit, Node

UP, DOWN, PLAIN = "#0072b2", "#d55e00", "#7f7f7f"
LEFT, TOP, ROW, STEP, PAD = 170, 70, 96, 30, 18
EDGES = 400
"""Drawn at most, the strongest; the picture says when there are more."""


def draw_curve(circuit: Circuit) -> str:
    """Faithfulness and completeness against the number of nodes."""
    inside = [(float(max(p.size, 1)), p.faithfulness) for p in circuit.curve if p.size]
    outside = [(float(max(p.size, 1)), p.completeness) for p in circuit.curve if p.size]
    series = [Series("faithfulness", inside, line=True), Series("completeness", outside, line=True)]
    panel = Panel(f"circuits of {circuit.metric}", "nodes", "share of the behaviour", series, log_x=True)
    return draw([panel], "Faithfulness and completeness of a circuit")


def draw_circuit(circuit: Circuit) -> str:
    """Nodes as circles (latents) and squares (errors), edges as wide as they weigh.

    Blue raises the metric, orange lowers it. Resting on a node or an edge shows its figures.
    """
    layers = [name for name in circuit.layers if any(node.source == name for node in circuit.nodes)]
    columns = sorted({-1 if node.position is None else node.position for node in circuit.nodes})
    cells: dict[tuple[str, int], list[Node]] = {}
    for node in circuit.nodes:
        cells.setdefault((node.source, -1 if node.position is None else node.position), []).append(node)
    widths = [max(len(cells.get((name, column), [])) for name in layers) for column in columns]
    starts = [LEFT + sum(widths[:i]) * STEP + i * PAD for i in range(len(columns))]
    width = max(LEFT + sum(widths) * STEP + len(widths) * PAD + 20, 420)
    height = TOP + len(layers) * ROW + 50
    places: dict[str, tuple[float, float]] = {"metric": (LEFT + (width - LEFT) / 2, TOP - 26)}
    for (name, column), members in cells.items():
        y = TOP + (len(layers) - 1 - layers.index(name)) * ROW + ROW / 2
        for i, node in enumerate(members):
            places[node.id] = (starts[columns.index(column)] + STEP * (i + 0.5), y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="sans-serif" font-size="10"><title>{escape(_title(circuit))}'
        f'</title><rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    ]
    parts.append(f'<text x="10" y="16" font-size="12" font-weight="bold">{escape(_title(circuit))}</text>')
    parts += _edges(circuit, places)
    for name in layers:
        y = TOP + (len(layers) - 1 - layers.index(name)) * ROW + ROW / 2
        label = f"error at {name}" if _is_hook(circuit, name) else name
        parts.append(f'<text x="10" y="{y + 4:g}" fill="#222222">{escape(label)}</text>')
    parts += [_node(circuit, node, *places[node.id]) for node in circuit.nodes]
    x, y = places["metric"]
    parts.append(
        f'<rect x="{x - 70:.1f}" y="{y - 11:.1f}" width="140" height="20" rx="4" fill="#222222"/>'
        f'<text x="{x:.1f}" y="{y + 3:.1f}" fill="#ffffff" text-anchor="middle">{escape(_short(circuit.metric))}</text>'
    )
    for column, start, count in zip(columns, starts, widths):
        if column >= 0:
            middle = start + count * STEP / 2
            token = escape(_short(circuit.tokens[0][column], 12))
            parts.append(
                f'<text x="{middle:.1f}" y="{height - 28:g}" text-anchor="middle">{token}</text>'
                f'<text x="{middle:.1f}" y="{height - 14:g}" text-anchor="middle" fill="{PLAIN}">{column}</text>'
            )
    return "".join(parts) + "</svg>\n"


def _title(circuit: Circuit) -> str:
    drawn = min(len(circuit.edges), EDGES)
    more = "" if drawn == len(circuit.edges) else f" of {len(circuit.edges)}"
    return (
        f"{circuit.metric}: {len(circuit.nodes)} nodes, {drawn}{more} edges, faithfulness {circuit.faithfulness:.2f}, "
        f"completeness {circuit.completeness:.2f}"
    )


def _edges(circuit: Circuit, places: dict[str, tuple[float, float]]) -> list[str]:
    shown = [e for e in circuit.edges[:EDGES] if e.source in places and e.target in places]
    largest = max((abs(edge.weight) for edge in shown), default=1.0) or 1.0
    parts: list[str] = []
    for edge in reversed(shown):
        (x1, y1), (x2, y2) = places[edge.source], places[edge.target]
        share = abs(edge.weight) / largest
        colour = UP if edge.weight > 0 else DOWN
        middle = (y1 + y2) / 2
        parts.append(
            f'<path d="M{x1:.1f},{y1:.1f} C{x1:.1f},{middle:.1f} {x2:.1f},{middle:.1f} {x2:.1f},{y2:.1f}" fill="none" '
            f'stroke="{colour}" stroke-width="{0.5 + 3.5 * share:.2f}" stroke-opacity="{0.15 + 0.6 * share:.2f}">'
            f"<title>{escape(edge.source)} → {escape(edge.target)}: {edge.weight:+.4g}</title></path>"
        )
    return parts


def _node(circuit: Circuit, node: Node, x: float, y: float) -> str:
    largest = max(abs(n.effect) for n in circuit.nodes) or 1.0
    colour = UP if node.effect > 0 else DOWN
    opacity = 0.25 + 0.75 * abs(node.effect) / largest
    style = f'fill="{colour}" fill-opacity="{opacity:.2f}" stroke="{colour}"'
    title = f"<title>{escape(node.id)}: effect {node.effect:+.4g}</title>"
    if node.latent is None:
        return f'<rect x="{x - 8:.1f}" y="{y - 8:.1f}" width="16" height="16" {style}>{title}</rect>'
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" {style}>{title}</circle>'
        f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle" font-size="8">{node.latent}</text>'
    )


def _is_hook(circuit: Circuit, name: str) -> bool:
    return all(node.latent is None for node in circuit.nodes if node.source == name)


def _short(text: str, most: int = 26) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= most else text[: most - 1] + "…"
