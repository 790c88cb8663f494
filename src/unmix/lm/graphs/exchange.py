"""Graph JSON in the layout that circuit-tracer 0.5 writes and Neuronpedia reads, there and back.

Ours adds `share` to nodes, `measured` to links and an `unmix` object to the metadata; readers of that layout ignore
keys they do not know. `influence` there is the running sum of shares in falling order, so that a slider can cut at it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmix.core.errors import CorruptError, FormatError
from unmix.core.seeds import slug
from unmix.lm.graphs.graph import AttributionGraph, Edge, Kind, Node

_TYPES: dict[Kind, str] = {
    "embedding": "embedding",
    "latent": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "logit": "logit",
}
_KINDS: dict[str, Kind] = {name: kind for kind, name in _TYPES.items()}


def to_json(graph: AttributionGraph) -> str:
    """The graph as text."""
    running, ids = _running(graph.nodes), _ids(graph.nodes)
    first = next((i for i, node in enumerate(graph.nodes) if node.kind == "logit"), -1)
    tree = {
        "metadata": {
            "slug": slug(graph.prompt.strip().lower())[:60],
            "scan": graph.model,
            "transcoder_list": sorted({node.coder for node in graph.nodes if node.coder}),
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.prompt,
            "node_threshold": None,
            "schema_version": 1,
            "unmix": {
                "n_layers": graph.n_layers, "unexpanded": graph.unexpanded, "dropped": graph.dropped, **graph.notes,
            },
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [{"node_id": ids[i], **_node(node, running[i], i == first)} for i, node in enumerate(graph.nodes)],
        "links": [
            {"source": ids[e.source], "target": ids[e.target], "weight": e.weight}
            | ({} if e.measured is None else {"measured": e.measured})
            for e in graph.edges
        ],
    }  # fmt: skip
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"


def read_json(path: Path) -> AttributionGraph:
    """The graph in a file. `CorruptError`: not JSON. `FormatError`: not this layout, naming the node or link."""
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict) or not {"metadata", "nodes", "links"} <= set(tree):
        raise FormatError(f"{path}: not an attribution graph; expected an object with metadata, nodes and links")
    try:
        return _graph(tree)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{path}: not an attribution graph of circuit-tracer's layout: {problem}") from None


def _ids(nodes: tuple[Node, ...]) -> list[str]:
    """Each node's id; latents of a second coder on a layer have its name after theirs, since links name nodes by id."""
    found: dict[str, None] = {}
    for node in nodes:
        known = node.id if node.id not in found else f"{node.id}_{node.coder}"
        if known in found:
            raise FormatError(f"the graph has two nodes {known!r}: links could not tell them apart")
        found[known] = None
    return list(found)


def _running(nodes: tuple[Node, ...]) -> list[float]:
    """Sum of shares down to and with each node, over the sum of all."""
    total = sum(node.influence for node in nodes) or 1.0
    order = sorted(range(len(nodes)), key=lambda i: -nodes[i].influence)
    found = [0.0] * len(nodes)
    sum_so_far = 0.0
    for i in order:
        sum_so_far += nodes[i].influence
        found[i] = min(1.0, sum_so_far / total)
    return found


def _node(node: Node, running: float, target: bool) -> dict[str, Any]:
    layer = {"embedding": "E", "logit": str(node.layer + 1)}.get(node.kind, str(node.layer))
    feature = {"embedding": node.position, "latent": _pair(node.layer, node.latent)}.get(node.kind, node.latent)
    label = f'Output "{node.token}" (p={node.probability:.3f})' if node.kind == "logit" else node.label
    known = {
        "feature": feature, "layer": layer, "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind], "token_prob": node.probability, "is_target_logit": target, "run_idx": 0,
        "reverse_ctx_idx": 0, "jsNodeId": _page_id(node), "clerp": label,
    }  # fmt: skip
    if node.kind == "logit":
        return {**known, "influence": None, "activation": node.activation, "token": node.token}
    activation = node.activation if node.kind == "latent" else None
    return {**known, "influence": running, "activation": activation, "share": node.influence, "coder": node.coder}


def _page_id(node: Node) -> str:
    if node.kind == "logit":
        return f"L_{node.latent}-{node.position}"
    start = "E" if node.kind == "embedding" else str(node.layer)
    return f"{start}_{node.latent}-{0 if node.kind == 'latent' else node.position}"


def _pair(a: int, b: int) -> int:
    """Cantor's number of a pair."""
    return (a + b) * (a + b + 1) // 2 + b


def _graph(tree: dict[str, Any]) -> AttributionGraph:
    about = tree["metadata"]
    tokens = tuple(str(t) for t in about["prompt_tokens"])
    own = dict(about.get("unmix") or {})
    shares = _shares(tree["nodes"])
    n_layers = own.pop("n_layers", None)
    if n_layers is None:
        layers = [int(n["layer"]) for n in tree["nodes"] if n["feature_type"] == "logit"]
        n_layers = max(layers) - 1 if layers else 0
    nodes = tuple(_read_node(n, tokens, int(n_layers), share) for n, share in zip(tree["nodes"], shares, strict=True))
    places = {str(n["node_id"]): i for i, n in enumerate(tree["nodes"])}
    if len(places) < len(nodes):
        twice = next(n["node_id"] for i, n in enumerate(tree["nodes"]) if places[str(n["node_id"])] != i)
        raise ValueError(f"two nodes have the node_id {twice!r}")
    edges: list[Edge] = []
    for link in tree["links"]:
        for end in ("source", "target"):
            if link[end] not in places:
                raise ValueError(f"a link's {end} {link[end]!r} is no node")
        measured = link.get("measured")
        edges.append(
            Edge(
                places[link["source"]], places[link["target"]], float(link["weight"]),
                None if measured is None else float(measured),
            )
        )  # fmt: skip
    return AttributionGraph(
        str(about["prompt"]), tokens, str(about["scan"]), int(n_layers), nodes, tuple(edges),
        float(own.pop("unexpanded", 0.0)), float(own.pop("dropped", 0.0)), {k: str(v) for k, v in own.items()},
    )  # fmt: skip


def _shares(nodes: list[dict[str, Any]]) -> list[float]:
    """Each node's share: ours, or the steps between their running sums."""
    known = [node.get("share") for node in nodes]
    if any(share is not None for share in known):
        return [float(share or 0.0) for share in known]
    found = [0.0] * len(nodes)
    before = 0.0
    ranked = [i for i, node in enumerate(nodes) if node.get("influence") is not None]
    for i in sorted(ranked, key=lambda i: nodes[i]["influence"]):
        found[i] = float(nodes[i]["influence"]) - before
        before = float(nodes[i]["influence"])
    return found


def _read_node(node: dict[str, Any], tokens: tuple[str, ...], n_layers: int, share: float) -> Node:
    kind = _KINDS.get(str(node["feature_type"]))
    if kind is None:
        raise ValueError(
            f"node {node['node_id']!r} has feature_type {node['feature_type']!r}; known: {', '.join(_KINDS)}"
        )
    position = int(node["ctx_idx"])
    token = tokens[position] if 0 <= position < len(tokens) else ""
    # A latent's `feature` is a pairing number in some files and its id in others; its node_id is LAYER_LATENT_POSITION.
    latent = -1 if kind == "error" else int(str(node["node_id"]).split("_")[1])
    layer = -1 if kind == "embedding" else n_layers if kind == "logit" else int(node["layer"])
    clerp = str(node.get("clerp") or "")
    if kind == "logit":
        quoted = clerp.split('"')
        token = str(node.get("token") or (quoted[1] if len(quoted) > 2 else clerp))
    return Node(
        kind, layer, position, latent, str(node.get("coder") or ""), token,
        float(node.get("activation") or 0.0), float(node.get("token_prob") or 0.0), share,
        "" if kind == "logit" else clerp,
    )  # fmt: skip
