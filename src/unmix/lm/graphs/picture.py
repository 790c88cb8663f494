"""A pruned attribution graph as SVG: the prompt's tokens along the bottom, layers upwards, the logits on top."""

from __future__ import annotations

from collections import defaultdict
from html import escape

from unmix.lm.graphs.graph import AttributionGraph, Node

COLUMN, ROW, LEFT, TOP, BOX, TALL = 124, 66, 72, 20, 104, 22
HELPS, HURTS = "#0072b2", "#d55e00"
_FILL = {"embedding": "#e8e8e8", "latent": "#ffffff", "error": "#f6e3e3", "logit": "#fff3c4"}


def draw(graph: AttributionGraph) -> str:
    """The picture. Edges are as thick as their share of what enters the target; blue helps, orange hurts."""
    rows = sorted({node.layer for node in graph.nodes})
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, node in enumerate(graph.nodes):
        cells[rows.index(node.layer), node.position].append(i)
    for cell in cells.values():
        cell.sort(key=lambda i: -graph.nodes[i].influence)
    columns = {p: max((len(c) for (_, q), c in cells.items() if q == p), default=1) for p in range(len(graph.tokens))}
    starts: dict[int, int] = {}
    x = LEFT
    for position, widest in columns.items():
        starts[position] = x
        x += widest * COLUMN
    height = TOP + (len(rows) - 1) * ROW + 50
    at = {
        node: (starts[p] + k * COLUMN, height - 50 - r * ROW)
        for (r, p), cell in cells.items()
        for k, node in enumerate(cell)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x + 10} {height}" width="{x + 10}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="11"><title>{_safe(_title(graph))}</title>'
        f'<rect width="{x + 10}" height="{height}" fill="#ffffff"/>'
    ]
    for r, layer in enumerate(rows):
        name = "tokens" if layer < 0 else "next token" if layer == graph.n_layers else f"layer {layer}"
        parts.append(f'<text x="6" y="{height - 35 - r * ROW}" fill="#777777">{name}</text>')
    parts += _edges(graph, at)
    parts += [_box(graph, i, *at[i]) for i in range(len(graph.nodes))]
    return "".join(parts) + "</svg>\n"


def _title(graph: AttributionGraph) -> str:
    return f"{graph.model}: {graph.prompt}"


def _edges(graph: AttributionGraph, at: dict[int, tuple[int, int]]) -> list[str]:
    total: dict[int, float] = defaultdict(float)
    for edge in graph.edges:
        total[edge.target] += abs(edge.weight)
    found: list[str] = []
    for edge in sorted(graph.edges, key=lambda e: abs(e.weight) / (total[e.target] or 1)):
        share = abs(edge.weight) / (total[edge.target] or 1)
        measured = "" if edge.measured is None else f", measured {edge.measured:+.3g}"
        label = f"{graph.nodes[edge.source].id} → {graph.nodes[edge.target].id}: {edge.weight:+.3g}{measured}"
        found.append(
            f'<path d="{_path(at[edge.source], at[edge.target])}" fill="none" '
            f'stroke="{HELPS if edge.weight > 0 else HURTS}" stroke-width="{0.8 + 5 * share:.2f}" '
            f'stroke-opacity="{0.4 + 0.5 * share**0.5:.2f}"><title>{_safe(label)}</title></path>'
        )
    return found


def _safe(text: str) -> str:
    """Text for SVG, which knows no control characters: a token may be one."""
    return escape("".join(c if c.isprintable() else " " if c.isspace() else "·" for c in text))


def _path(source: tuple[int, int], target: tuple[int, int]) -> str:
    """From the top of one box to the foot of another; past boxes that stand between them, where they do."""
    (x1, y1), (x2, y2) = source, target
    x1, x2, y2 = x1 + BOX // 2, x2 + BOX // 2, y2 + TALL
    between = (y1 - y2 + TALL) // ROW - 1
    aside = BOX // 2 + 4 * min(between, 6) if x1 == x2 and between > 0 else 0
    bend = (y1 - y2) / 2 if not aside else ROW
    return f"M{x1},{y1} C{x1 + 4 * aside / 3:g},{y1 - bend:g} {x2 + 4 * aside / 3:g},{y2 + bend:g} {x2},{y2}"


def _box(graph: AttributionGraph, i: int, x: int, y: int) -> str:
    node = graph.nodes[i]
    dash = ' stroke-dasharray="3 2"' if node.kind == "error" else ""
    return (
        f'<g><title>{_safe(_about(node))}</title><rect x="{x}" y="{y}" width="{BOX}" height="{TALL}" rx="4" '
        f'fill="{_FILL[node.kind]}" stroke="#555555"{dash}/>'
        f'<text x="{x + BOX // 2}" y="{y + 15}" text-anchor="middle">{_safe(_short(node))}</text></g>'
    )


def _short(node: Node) -> str:
    shown = {
        "embedding": node.token, "error": "error", "logit": f"{node.token} {node.probability:.0%}",
        "latent": node.label or f"{node.latent}",
    }[node.kind]  # fmt: skip
    shown = shown.replace("\n", "⏎").strip() or "␣"
    return shown if len(shown) <= 17 else shown[:16] + "…"


def _about(node: Node) -> str:
    where = f"position {node.position}"
    if node.kind == "latent":
        what = f"latent {node.latent} of layer {node.layer} ({node.coder}), {where}, value {node.activation:.3g}"
        return f"{what}. {node.label}" if node.label else what
    if node.kind == "logit":
        return f"{node.token!r} next, probability {node.probability:.3f}"
    return (
        f"{node.kind} at {where}: {node.token!r}, layer {node.layer}" if node.layer >= 0 else f"{node.token!r}, {where}"
    )
