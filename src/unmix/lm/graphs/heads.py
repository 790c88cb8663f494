"""The side of attention that a graph holds fixed: which heads carried an effect, and what made them look there.

An attention score is a product of a query and a key, and both are sums over nodes. So a score is a sum over pairs of
nodes, one on the query's side and one on the key's (Kamath et al. 2025, "Tracing Attention Computation Through Feature
Interactions"). Norms, and the queries' and keys' own, are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.core.errors import ConfigError
from unmix.lm.graphs.attention import AttentionCall
from unmix.lm.graphs.build import node_of
from unmix.lm.graphs.graph import Node
from unmix.lm.graphs.replacement import Flow, LocalReplacement, Target


@dataclass(frozen=True)
class Attended:
    """What one head moved from position `key` to position `query` on behalf of a target."""

    layer: int
    head: int
    query: int
    key: int
    weight: float
    """What it adds to the target's value."""
    pattern: float
    """The attention weight, 0 to 1."""


@dataclass(frozen=True)
class AttentionCauses:
    """Why a query looked at a key."""

    layer: int
    head: int
    query: int
    key: int
    score: float
    """q·k times the head's scale, before soft caps, masks and the softmax."""
    queries: tuple[tuple[Node, float], ...]
    """Nodes of the query's side and what each adds to the score with the key as it is."""
    keys: tuple[tuple[Node, float], ...]
    """The same for the key's side."""
    pairs: tuple[tuple[Node, Node, float], ...]
    """(query's node, key's node, product) of the nodes above, strongest first."""


def heads(replacement: LocalReplacement, target: Target, top: int = 20) -> list[Attended]:
    """The heads that brought most to a target, at the target's own position; strongest first."""
    calls: dict[int, AttentionCall] = {}
    names = [f"blocks.{layer}.z" for layer in range(replacement.lm.n_layers)]
    flow = replacement.forward(1, lambda layer, call: calls.__setitem__(layer, _detached(call)), also=names)
    vectors: list[Tensor] = []
    for hook, vector in target.parts:
        whole = torch.zeros_like(flow.reads[hook])
        whole[0, target.position] = vector
        vectors.append(whole)
    reads = [flow.reads[hook] for hook, _ in target.parts]
    found_at = torch.autograd.grad(reads, [flow.reads[name] for name in names], vectors, allow_unused=True)
    grads: list[Tensor | None] = list(found_at)
    found: list[Attended] = []
    for layer, grad in enumerate(grads):
        if grad is not None:
            found += _moved(layer, calls[layer], grad[0, target.position], target.position)
    return sorted(found, key=lambda a: -abs(a.weight))[:top]


def _detached(call: AttentionCall) -> AttentionCall:
    return AttentionCall(call.query.detach(), call.key.detach(), call.value.detach(), call.scaling, call.run)


@torch.no_grad()
def _moved(layer: int, call: AttentionCall, grad: Tensor, query: int) -> list[Attended]:
    """Every head's and key's part of <gradient at z of the query's position, z>."""
    pattern = patterns(call, query)
    n_heads, length = pattern.shape
    values = call.value[0].repeat_interleave(n_heads // call.value.shape[1], dim=0)
    weights = pattern * torch.einsum("hd,hpd->hp", grad.view(n_heads, -1).float(), values.float())
    return [
        Attended(layer, head, query, key, float(weights[head, key]), float(pattern[head, key]))
        for head in range(n_heads)
        for key in range(length)
        if weights[head, key] != 0
    ]


def patterns(call: AttentionCall, query: int) -> Float[Tensor, "heads pos"]:
    """Attention weights of one query, by letting the kernel mix unit vectors: masks, caps and sinks are the model's."""
    length, size = call.value.shape[2], call.value.shape[3]
    found: list[Tensor] = []
    for start in range(0, length, size):
        probe = torch.zeros_like(call.value)
        n = min(size, length - start)
        probe[:, :, torch.arange(start, start + n), torch.arange(n)] = 1
        found.append(call.run(call.query, call.key, probe)[0, query, :, :n].float())
    return torch.cat(found, dim=-1)


def attention_causes(
    replacement: LocalReplacement, layer: int, head: int, query: int, key: int, top: int = 10
) -> AttentionCauses:
    """What made `head` of `layer` look from position `query` at position `key`, by nodes of both sides.

    `ConfigError` for a layer, head or position that there is not, or a key after its query.
    """
    if not 0 <= layer < replacement.lm.n_layers:
        raise ConfigError(f"layer {layer}: {replacement.lm.name} has layers 0 to {replacement.lm.n_layers - 1}")
    if not 0 <= key <= query < replacement.length:
        raise ConfigError(f"query {query}, key {key}: allowed are 0 <= key <= query < {replacement.length}")
    calls: list[AttentionCall] = []

    def watch(at: int, call: AttentionCall) -> None:
        if at == layer:
            calls.append(call)

    flow = replacement.forward(replacement.copies, watch)
    (call,) = calls
    n_heads = call.query.shape[1]
    if not 0 <= head < n_heads:
        raise ConfigError(f"head {head}: layer {layer} has heads 0 to {n_heads - 1}")
    key_head = head // (n_heads // call.key.shape[1])
    q, k = call.query[0, head, query].detach().float(), call.key[0, key_head, key].detach().float()
    left = call.scaling * _through(replacement, flow, call.query, head, query, k[None])[0]
    right = call.scaling * _through(replacement, flow, call.key, key_head, key, q[None])[0]
    a, b = _best(left, top), _best(right, top)
    each = torch.eye(len(q), device=q.device)
    of_query = _through(replacement, flow, call.query, head, query, each, a)
    of_key = _through(replacement, flow, call.key, key_head, key, each, b)
    products = call.scaling * of_query.T @ of_key
    order = products.abs().reshape(-1).argsort(descending=True)[:top].tolist()
    at = [divmod(place, len(b)) for place in order]
    return AttentionCauses(
        layer, head, query, key, float(call.scaling * q @ k),
        tuple((node_of(replacement, c), float(left[c])) for c in a),
        tuple((node_of(replacement, c), float(right[c])) for c in b),
        tuple((node_of(replacement, a[i]), node_of(replacement, b[j]), float(products[i, j])) for i, j in at),
    )  # fmt: skip


def _best(effects: Tensor, top: int) -> Sequence[int]:
    best = effects.abs().topk(min(top, len(effects)))
    return [c for c, size in zip(best.indices.tolist(), best.values.tolist(), strict=True) if size > 0]


def _through(
    replacement: LocalReplacement, flow: Flow, heads: Tensor, head: int, position: int, along: Tensor,
    columns: Sequence[int] | None = None,
) -> Float[Tensor, "n columns"]:  # fmt: skip
    """What every node (or those of `columns`) adds to a head's query or key at a position, along each of [n, size]."""
    found: list[Tensor] = []
    for some in along.split(flow.batch):
        vector = torch.zeros_like(heads)
        vector[: len(some), head, position] = some.to(heads.dtype)
        effects = replacement.effects(flow.back([heads], [vector]))[: len(some)]
        # A row has as many columns as the prompt has nodes: only what is wanted of it is kept.
        found.append(effects if columns is None else effects[:, list(columns)])
    return torch.cat(found)
