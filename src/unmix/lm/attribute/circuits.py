"""Sparse feature circuits: the latents and errors that a behaviour runs through, and what each gives to the next.

After Marks et al. 2024 (arXiv 2403.19647 §3): nodes by their effect (`effects.py`), edges by products of a node's
slope with its derivative by earlier nodes, where every node between is held, and the circuit judged by running the
model with everything outside it (or inside it) at its baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unmix.core.atomic import write_json, write_text
from unmix.core.errors import ConfigError
from unmix.lm.attribute.attributing import check_method, prepare, prompt_tokens, wired
from unmix.lm.attribute.baselines import Baseline, Means, Nodes
from unmix.lm.attribute.effects import Effects, gradient, integrated
from unmix.lm.attribute.result import strings_of
from unmix.lm.attribute.targets import Target
from unmix.lm.bound import BoundModel

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

Positions = Literal["each", "sum"]
SCHEMA = "unmix-circuit-1"


@dataclass(frozen=True)
class Node:
    """One node of a circuit."""

    source: str
    """The coder's name; of an error, the hook's."""
    latent: int | None
    """`None` for an error."""
    position: int | None
    """`None` where positions are summed: the node is the latent wherever it fires."""
    effect: float
    """Mean over contexts (and sum over positions, where they are summed)."""

    @property
    def id(self) -> str:
        """`layers.3/17@5`, `error:blocks.3.resid_post@5`."""
        name = f"error:{self.source}" if self.latent is None else f"{self.source}/{self.latent}"
        return name if self.position is None else f"{name}@{self.position}"


@dataclass(frozen=True)
class Edge:
    """What `source` gives to `target` (ids of nodes; `metric` is the end): part of the target's effect."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True)
class CurvePoint:
    """The `size` strongest nodes as a circuit."""

    size: int
    faithfulness: float
    completeness: float


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges above their thresholds, and how much of the behaviour they carry."""

    nodes: list[Node]
    """Strongest first."""
    edges: list[Edge]
    metric: str
    value: float
    """The metric, mean over contexts."""
    empty: float
    """The metric with every node at its baseline."""
    faithfulness: float
    """(m with everything outside the circuit at its baseline − empty) / (value − empty)."""
    completeness: float
    """The same of what is outside: how much the circuit leaves behind. 0 is complete."""
    curve: list[CurvePoint]
    positions: Positions
    baseline: Baseline
    tokens: list[list[str]]
    layers: list[str] = field(default_factory=lambda: [])
    """Coders and hooks of errors, first in the forward pass first; of a hook's coders and its error, the coders."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": SCHEMA,
            "metric": {"name": self.metric, "value": self.value, "empty": self.empty},
            "faithfulness": self.faithfulness,
            "completeness": self.completeness,
            "positions": self.positions,
            "baseline": self.baseline,
            "tokens": self.tokens,
            "layers": self.layers,
            "nodes": [{"id": node.id, **vars(node)} for node in self.nodes],
            "edges": [vars(edge) for edge in self.edges],
            "curve": [vars(point) for point in self.curve],
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, atomically."""
        write_json(path, self.to_dict())

    def to_svg(self, path: str | Path | None = None) -> str:
        """A picture of nodes and edges; written to `path` where one is given."""
        from unmix.lm.attribute.drawing import draw_circuit

        text = draw_circuit(self)
        if path is not None:
            write_text(path, text)
        return text

    def curve_svg(self, path: str | Path | None = None) -> str:
        """Faithfulness and completeness by number of nodes, as a picture."""
        from unmix.lm.attribute.drawing import draw_curve

        text = draw_curve(self)
        if path is not None:
            write_text(path, text)
        return text

    def _repr_svg_(self) -> str:
        """Shown by notebooks."""
        return self.to_svg()


def find_circuit(
    model: BoundModel | tuple[LanguageModel, Any],
    prompts: Any,
    target: Target = None,
    *,
    against: Target = None,
    metric: str | None = None,
    position: int = -1,
    corrupt: Any = None,
    means: Means | None = None,
    method: str = "ig",
    steps: int = 10,
    node_threshold: float = 0.1,
    edge_threshold: float = 0.01,
    limit: int | None = 200,
    positions: str = "each",
    sizes: Sequence[int] | None = None,
) -> Circuit:
    """The circuit of a metric over the bound coders, from prompts of one length.

    Arguments up to `steps` as for `attribute` (`method` is `ig` or `gradient`). Nodes are those of at least
    `node_threshold` mean effect by absolute value, at most `limit` of them; edges those of at least `edge_threshold`,
    both in units of the metric. `positions="each"`: a node is a latent at a place, so prompts should be aligned;
    `"sum"`: wherever it fires. `sizes`: how many of the strongest nodes the curve looks at (default: powers of two).

    One backward pass a node of the circuit, and two passes a point of the curve. Errors as `attribute`.
    """
    from unmix.lm.attribute.edges import find_edges
    from unmix.lm.attribute.faithful import Judge

    if check_method(method, steps, 1, limit) == "patch":
        raise ConfigError("method is 'patch': edges need slopes, so circuits take 'ig' or 'gradient'")
    chosen = _positions(positions)
    with wired(model) as (wiring, policy):
        tokens = prompt_tokens(wiring.lm, prompts, policy)
        other = None if corrupt is None else prompt_tokens(wiring.lm, corrupt, policy)
        measure, nodes = prepare(wiring, tokens, target, against, metric, position, other, means)
        found = gradient(wiring, tokens, measure, nodes)
        if method == "ig":
            found = integrated(wiring, tokens, measure, nodes, steps)
        ranked = rank_nodes(nodes, found, chosen)
        kept = [node for node in ranked if abs(node.effect) >= node_threshold][:limit]
        edges = find_edges(wiring, tokens, measure, nodes, found, kept, chosen, edge_threshold)
        judge = Judge(wiring, tokens, measure, nodes, chosen)
        curve = [CurvePoint(n, *judge.both(ranked[:n])) for n in _sizes(sizes, len(ranked))]
        faithfulness, completeness = judge.both(kept)
        return Circuit(
            kept, edges, measure.name, judge.value, judge.empty, faithfulness, completeness, curve, chosen, nodes.kind,
            strings_of(wiring, tokens), _layers(wiring),
        )  # fmt: skip


def judge_circuit(
    model: BoundModel | tuple[LanguageModel, Any],
    circuit: Circuit,
    prompts: Any,
    target: Target = None,
    *,
    against: Target = None,
    metric: str | None = None,
    position: int = -1,
    corrupt: Any = None,
    means: Means | None = None,
) -> tuple[float, float]:
    """Faithfulness and completeness of a circuit on other prompts (of the same length where its positions count)."""
    from unmix.lm.attribute.faithful import Judge

    with wired(model) as (wiring, policy):
        tokens = prompt_tokens(wiring.lm, prompts, policy)
        if circuit.positions == "each" and tokens.shape[1] != len(circuit.tokens[0]):
            raise ConfigError(
                f"the circuit is of {len(circuit.tokens[0])} positions, the prompts have {tokens.shape[1]} tokens"
            )
        other = None if corrupt is None else prompt_tokens(wiring.lm, corrupt, policy)
        measure, nodes = prepare(wiring, tokens, target, against, metric, position, other, means)
        return Judge(wiring, tokens, measure, nodes, circuit.positions).both(circuit.nodes)


def rank_nodes(nodes: Nodes, effects: Effects, positions: Positions) -> list[Node]:
    """Every node with its effect, strongest first; nodes of no effect at all are left out."""
    found: list[Node] = []
    for name, codes in nodes.codes.items():
        batch, length = codes.leading
        keys = node_keys(codes.token_rows(), codes.indices.long(), length, codes.n_latents, positions).cpu()
        ids, owner = keys.unique(return_inverse=True)
        totals = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, owner, effects.latents[name].double())
        for key, total in zip(ids.tolist(), (totals / batch).tolist()):
            place, latent = divmod(key, codes.n_latents)
            found.append(Node(name, latent, place if positions == "each" else None, total))
    for hook, per_place in effects.errors.items():
        mean = per_place.double().sum(0) / len(per_place)
        if positions == "sum":
            found.append(Node(hook, None, None, float(mean.sum())))
        else:
            found += [Node(hook, None, place, value) for place, value in enumerate(mean.tolist())]
    return sorted((node for node in found if node.effect), key=lambda node: (-abs(node.effect), node.id))


def node_keys(rows: Tensor, latents: Tensor, length: int, n_latents: int, positions: Positions) -> Tensor:
    """position · n_latents + latent of entries (rows run through contexts); where positions are summed, the latent."""
    return latents if positions == "sum" else rows % length * n_latents + latents


def _positions(value: str) -> Positions:
    if value == "each" or value == "sum":
        return value
    raise ConfigError(f"positions is {value!r}; allowed: each, sum")


def _sizes(given: Sequence[int] | None, total: int) -> list[int]:
    if given is None:
        powers = [2**i for i in range(total.bit_length())]
        return [0, *[n for n in powers if n < total], total]
    wrong = [n for n in given if n < 0]
    if wrong:
        raise ConfigError(f"sizes: {wrong[0]} is no number of nodes")
    return [min(n, total) for n in given]


def _layers(wiring: Any) -> list[str]:
    """Coders and write hooks in the order in which the model reaches them."""
    known = {name: i for i, name in enumerate(wiring.lm.hooks())}
    order = sorted(wiring.writers, key=lambda hook: known.get(hook.partition("#")[0].partition("~")[0], len(known)))
    listed: list[str] = []
    for hook in order:
        listed += [binding.name for binding, _ in wiring.writers[hook] if binding.name not in listed]
        listed += [hook] if hook not in listed else []
    return listed
