"""Edges of a circuit: what one node gives to the next with every node between them held.

In the pass below each hook hands on leaves (the nodes' values), so a derivative of what reaches a later coder by an
earlier leaf runs through attention, MLPs and the stream, and through no other node. An edge's weight is
slope of the target × ∂ target / ∂ source × (source − its baseline), summed over contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.lm.attribute.baselines import Nodes
from unmix.lm.attribute.circuits import Edge, Node, Positions, node_keys
from unmix.lm.attribute.effects import Effects
from unmix.lm.attribute.targets import Metric
from unmix.lm.attribute.wiring import Wiring, at_keys, keys_of, score
from unmix.lm.splice import Binding


def find_edges(
    wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes, effects: Effects, kept: Sequence[Node],
    positions: Positions, threshold: float,
) -> list[Edge]:  # fmt: skip
    """Edges of at least `threshold` by absolute value between nodes of `kept`, and from them to the metric.

    One backward pass a node; the graph of one forward pass is held meanwhile. An infinite threshold looks for none.
    """
    if not kept or threshold == float("inf"):
        return []
    cut = _Cut(wiring, nodes)
    with torch.enable_grad():
        value = score(
            wiring, tokens, metric, torch.arange(len(tokens)), lambda p: wiring.attach(p, tokens, cut.encode, cut.write)
        )
        leaves = [*cut.leaves.values(), *cut.errors.values()]
        found: list[Edge] = []
        for target, scalar in [("metric", value.sum()), *_targets(cut, nodes, effects, kept, positions, tokens)]:
            if not scalar.requires_grad:
                continue
            slopes = torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            weights = _weights(cut, nodes, slopes, positions, len(tokens))
            for node in kept:
                weight = weights.get(_key(node), 0.0)
                if abs(weight) >= threshold and node.id != target:
                    found.append(Edge(node.id, target, weight))
    return sorted(found, key=lambda edge: (-abs(edge.weight), edge.source, edge.target))


class _Cut:
    """The rules of the pass, and what reaches each coder and hook in it."""

    def __init__(self, wiring: Wiring, nodes: Nodes) -> None:
        self.wiring, self.nodes = wiring, nodes
        self.leaves = {name: codes.values.detach().clone().requires_grad_() for name, codes in nodes.codes.items()}
        self.errors = {hook: error.detach().clone().requires_grad_() for hook, error in nodes.errors.items()}
        self.reached: dict[str, Tensor] = {}
        """By coder, the latents' values as they come from earlier leaves, at the nodes' entries [nnz]."""
        self.parts: dict[str, list[Tensor]] = {}
        self.left: dict[str, Tensor] = {}
        """By hook, the error as it comes from earlier leaves [batch, pos, d]."""

    def encode(self, binding: Binding, x: Tensor) -> Codes:
        own, current = self.nodes.codes[binding.name], binding.coder.encode(x)
        self.reached[binding.name] = at_keys(current, keys_of(own))
        if self.errors:
            self.parts[binding.name] = list(binding.coder.decode(current).split(binding.widths, dim=-1))
        return replace(own, values=self.leaves[binding.name])

    def write(self, hook: str, x: Tensor, y: Tensor) -> Tensor:
        if hook not in self.errors:
            return y
        explained = [self.parts[binding.name][index] for binding, index in self.wiring.writers[hook]]
        self.left[hook] = x.to(y.dtype) - torch.stack(explained).sum(0)
        return y + self.errors[hook]


def _targets(
    cut: _Cut, nodes: Nodes, effects: Effects, kept: Sequence[Node], positions: Positions, tokens: Tensor
) -> list[tuple[str, Tensor]]:
    """(id, slope × the node as earlier leaves make it, summed over contexts), for each node that has slopes."""
    length = tokens.shape[1]
    found: list[tuple[str, Tensor]] = []
    for node in kept:
        if node.latent is None:
            slope, left = effects.error_slopes[node.source], cut.left[node.source]
            mask = nodes.masks[node.source].to(left.device)[..., None]
            product = torch.where(mask, slope * left, 0.0)
            found.append((node.id, product.sum() if node.position is None else product[:, node.position].sum()))
            continue
        codes = nodes.codes[node.source]
        keys = node_keys(codes.token_rows(), codes.indices.long(), length, codes.n_latents, positions)
        hit = keys == _key(node)[1] * codes.n_latents + node.latent if positions == "each" else keys == node.latent
        found.append((node.id, (effects.latent_slopes[node.source] * cut.reached[node.source])[hit].sum()))
    return found


def _weights(
    cut: _Cut, nodes: Nodes, slopes: Sequence[Tensor], positions: Positions, batch: int
) -> dict[tuple[str, int, int | None], float]:
    """Derivative × (value − baseline) of every node, mean over contexts, those of no weight left out."""
    found: dict[tuple[str, int, int | None], float] = {}
    split = len(cut.leaves)
    for name, slope in zip(cut.leaves, slopes[:split]):
        codes = nodes.codes[name]
        given = slope * (codes.values - nodes.bases[name])
        (some,) = given.nonzero(as_tuple=True)
        if not len(some):
            continue
        keys = node_keys(
            codes.token_rows()[some], codes.indices.long()[some], codes.leading[1], codes.n_latents, positions
        )
        ids, owner = keys.unique(return_inverse=True)
        totals = given.new_zeros(len(ids), dtype=torch.float64).index_add_(0, owner, given[some].double()) / batch
        for key, total in zip(ids.tolist(), totals.tolist()):
            place, latent = divmod(key, codes.n_latents)
            found[name, place if positions == "each" else -1, latent] = total
    for hook, slope in zip(cut.errors, slopes[split:]):
        moved = (slope * (nodes.errors[hook] - nodes.error_bases[hook])).sum(-1)
        mean = torch.where(nodes.masks[hook].to(moved.device), moved, 0.0).double().sum(0) / batch
        if positions == "sum":
            found[hook, -1, None] = float(mean.sum())
        else:
            found |= {(hook, place, None): value for place, value in enumerate(mean.tolist())}
    return found


def _key(node: Node) -> tuple[str, int, int | None]:
    return node.source, -1 if node.position is None else node.position, node.latent
