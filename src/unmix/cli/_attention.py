"""How `unmix graph --attention` shows what attention did."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmix.lm.graphs.graph import AttributionGraph, Node
    from unmix.lm.graphs.replacement import LocalReplacement

EDGES, HEADS, CAUSES = 3, 3, 4


def attention_lines(graph: AttributionGraph, replacement: LocalReplacement, against: int | None = None) -> list[str]:
    """The heads behind the strongest logit and the strongest latents, and both sides of their scores."""
    from unmix.lm.graphs.heads import attention_causes, heads
    from unmix.lm.graphs.measure import target_of

    ranked = sorted(
        (i for i, node in enumerate(graph.nodes) if node.kind in ("logit", "latent")),
        key=lambda i: -max(graph.nodes[i].influence, graph.nodes[i].probability),
    )
    lines = ["", "attention"]
    for i in ranked[:EDGES]:
        node = graph.nodes[i]
        lines.append(f"  into {_named(node)}")
        moved = [a for a in heads(replacement, target_of(replacement, node, against), 50) if a.key != a.query]
        for a in moved[:HEADS]:
            token = graph.tokens[a.key]
            lines.append(
                f"    {a.weight:+8.3f}  layer {a.layer} head {a.head} from {a.key} {token!r}, attention {a.pattern:.2f}"
            )
            why = attention_causes(replacement, a.layer, a.head, a.query, a.key, CAUSES)
            for query, key, product in why.pairs:
                lines.append(f"        {product:+7.3f}  asked by {_named(query)}, answered by {_named(key)}")
    return lines


def _named(node: Node) -> str:
    if node.kind == "latent":
        return f"latent {node.latent} of layer {node.layer} at {node.position} {node.token!r}"
    if node.kind == "embedding":
        return f"token {node.position} {node.token!r}"
    if node.kind == "logit":
        return f"next token {node.token!r}"
    return f"error of layer {node.layer} at {node.position} {node.token!r}"
