"""An attribution graph as data: nodes, direct effects between them, and how much of the outcome they carry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from unmix.core.atomic import write_text
from unmix.core.errors import ConfigError

Kind = Literal["embedding", "latent", "error", "logit"]


@dataclass(frozen=True)
class Node:
    """One thing that acts or is acted on. Positions and layers count from 0."""

    kind: Kind
    layer: int
    """−1 for embeddings, the number of layers for logits."""
    position: int
    latent: int
    """Latent id; of embeddings and logits the token id; −1 of errors."""
    coder: str = ""
    token: str = ""
    """Display string of the token at the position; of a logit, of the token predicted."""
    activation: float = 0.0
    """The latent's value, or the logit less the mean logit."""
    probability: float = 0.0
    """Of a logit's token."""
    influence: float = 0.0
    """Share of the logits (weighted by probability) that reaches this node along all paths, 0 to 1."""
    label: str = ""
    """What the latent is about, where somebody has said so."""

    @property
    def id(self) -> str:
        """Unique in a graph that has one coder a layer."""
        if self.kind == "embedding":
            return f"E_{self.latent}_{self.position}"
        layer = self.layer + 1 if self.kind == "logit" else self.layer
        return f"{layer}_{self.latent}_{self.position}"


@dataclass(frozen=True, slots=True)
class Edge:
    """The direct effect of node `source` on node `target` (places in `AttributionGraph.nodes`)."""

    source: int
    target: int
    weight: float
    """What the source adds to the target's value with attention and norms held."""
    measured: float | None = None
    """By how much the target falls where the source's writing is taken out, attention and norms free to answer."""


@dataclass(frozen=True)
class AttributionGraph:
    """A graph of one prompt."""

    prompt: str
    tokens: tuple[str, ...]
    """Display strings of the prompt's tokens."""
    model: str
    n_layers: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    unexpanded: float = 0.0
    """Share of the logits that enters latents whose own causes were not worked out (see `attribution_graph`)."""
    dropped: float = 0.0
    """Largest share of one target's absolute effects that was too small, effect by effect, to be kept."""
    notes: dict[str, str] = field(default_factory=lambda: {})

    def matrix(self) -> NDArray[np.float64]:
        """Effects as [targets, sources]; prune first, a long prompt has tens of thousands of nodes."""
        found = np.zeros((len(self.nodes), len(self.nodes)))
        for edge in self.edges:
            found[edge.target, edge.source] = edge.weight
        return found

    def into(self, node: int) -> list[Edge]:
        """Edges that end in a node, strongest first."""
        return sorted((e for e in self.edges if e.target == node), key=lambda e: -abs(e.weight))

    def find(self, id: str) -> int:
        """Place of the node of this id; `ConfigError` where there is none."""
        for i, node in enumerate(self.nodes):
            if node.id == id:
                return i
        raise ConfigError(f"no node {id!r} in this graph; ids read LAYER_LATENT_POSITION, E_TOKEN_POSITION for tokens")

    def scores(self) -> dict[str, float]:
        """Replacement and completeness, 0 to 1 (Ameisen et al. 2025, §"Evaluating").

        `replacement`: of what reaches the logits from embeddings and errors, the share from embeddings.
        `completeness`: of what enters any node, weighted by the node's influence, the share not from errors.
        """
        links, weight = self._links(), self._logit_weights()
        shares = links.shares()
        influence = links.influence(shares, weight)
        kinds = np.array([node.kind for node in self.nodes])
        tokens, errors = influence[kinds == "embedding"].sum(), influence[kinds == "error"].sum()
        carried = influence + weight
        known = 1 - np.bincount(
            links.targets, weights=shares * (kinds[links.sources] == "error"), minlength=links.nodes
        )
        total = carried.sum()
        return {
            "replacement": float(tokens / (tokens + errors)) if tokens + errors else 1.0,
            "completeness": float((carried * known).sum() / total) if total else 1.0,
        }

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
        """The graph without what matters least; embeddings and logits always stay.

        Kept are the nodes, then the edges, that carry these shares of all influence (0 to 1]; then what has lost its
        way to the logits or (latents) all its causes goes too. `ConfigError` for shares outside.
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not 0 < share <= 1:
                raise ConfigError(f"{name} is {share}; allowed: above 0, up to 1")
        links, weight = self._links(), self._logit_weights()
        ends = np.array([node.kind in ("embedding", "logit") for node in self.nodes], dtype=bool)
        latent = np.array([node.kind == "latent" for node in self.nodes], dtype=bool)
        kept = _largest(links.influence(links.shares(), weight), nodes) | ends
        links = replace(links, sizes=links.sizes * links.between(kept))
        shares = links.shares()
        flows = shares * (links.influence(shares, weight) + weight)[links.targets]
        chosen = _largest(flows, edges)
        while True:
            begins, arrives = (
                np.bincount(e[chosen], minlength=links.nodes) > 0 for e in (links.sources, links.targets)
            )
            alive = kept & (ends | (begins & (~latent | arrives)))
            if bool((alive == kept).all()):
                break
            kept = alive
            chosen &= links.between(kept)
        places = np.cumsum(kept) - 1
        left = [self.edges[i] for i in np.flatnonzero(chosen)]
        return replace(
            self, nodes=tuple(self.nodes[i] for i in np.flatnonzero(kept)),
            edges=tuple(replace(e, source=int(places[e.source]), target=int(places[e.target])) for e in left),
        )  # fmt: skip

    def labelled(self, labels: dict[tuple[str, int], str]) -> AttributionGraph:
        """With what latents are about: {(coder, latent): text}."""
        nodes = tuple(
            replace(node, label=labels[node.coder, node.latent]) if (node.coder, node.latent) in labels else node
            for node in self.nodes
        )
        return replace(self, nodes=nodes)

    def save(self, path: str | Path) -> None:
        """Write JSON in the layout of circuit-tracer and Neuronpedia; see `unmix.lm.graphs.exchange`."""
        from unmix.lm.graphs.exchange import to_json

        write_text(Path(path), to_json(self))

    @staticmethod
    def open(path: str | Path) -> AttributionGraph:
        """Read JSON in that layout, ours or theirs."""
        from unmix.lm.graphs.exchange import read_json

        return read_json(Path(path))

    def picture(self, path: str | Path) -> None:
        """Draw the graph as SVG: positions across, layers upwards. Prune first: hundreds of nodes are no picture."""
        from unmix.lm.graphs.picture import draw

        write_text(Path(path), draw(self))

    def _links(self) -> Links:
        n = len(self.edges)
        sources, targets = (
            np.fromiter((getattr(e, end) for e in self.edges), np.int64, n) for end in ("source", "target")
        )
        sizes = np.fromiter((abs(e.weight) for e in self.edges), np.float64, n)
        return Links(sources, targets, sizes, len(self.nodes))

    def _logit_weights(self) -> NDArray[np.float64]:
        return np.array([node.probability if node.kind == "logit" else 0.0 for node in self.nodes])


@dataclass(frozen=True)
class Links:
    """Edges as arrays. The nodes of a long prompt's graph are too many for a matrix of them."""

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    sizes: Float[np.ndarray, " edges"]
    """Absolute effects."""
    nodes: int

    def shares(self) -> Float[np.ndarray, " edges"]:
        """Each edge's part of what enters its target."""
        total = np.bincount(self.targets, weights=self.sizes, minlength=self.nodes)[self.targets]
        return np.divide(self.sizes, total, out=np.zeros_like(self.sizes), where=total > 0)

    def influence(
        self, shares: Float[np.ndarray, " edges"], weight: Float[np.ndarray, " nodes"]
    ) -> Float[np.ndarray, " nodes"]:
        """Weight that reaches each node from the logits along all paths: w(S + S² + …), which end."""
        total, step = np.zeros_like(weight), weight
        for _ in range(self.nodes):
            step = np.bincount(self.sources, weights=shares * step[self.targets], minlength=self.nodes)
            if not step.any():
                break
            total += step
        return total

    def between(self, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The edges whose both ends are kept."""
        return kept[self.sources] & kept[self.targets]


def _largest(values: Float[np.ndarray, " n"], share: float) -> NDArray[np.bool_]:
    """The fewest values that hold `share` of the sum."""
    order = np.argsort(-values, kind="stable")
    sums = np.cumsum(values[order])
    kept = np.zeros(len(values), dtype=bool)
    if len(values) and sums[-1] > 0:
        kept[order[: int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1]] = True
    return kept & (values > 0)
