"""What edges of a graph are worth in the model itself: take out what the source writes, see what the target loses.

Attention patterns and norms answer freely; other MLPs' outputs stay what they were, so that only the direct way counts.
A linear effect that the model does not share shows here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.core.errors import ConfigError
from unmix.lm.forward import Edit
from unmix.lm.graphs.graph import AttributionGraph, Node
from unmix.lm.graphs.replacement import EMBEDDINGS, LAST, LocalReplacement, Target
from unmix.lm.graphs.transcoders import Transcoder, layer_of, written

COPIES = 16
"""Sources taken out in one pass, each in its own copy of the prompt."""


@torch.no_grad()
def measured(graph: AttributionGraph, replacement: LocalReplacement, against: int | None = None) -> AttributionGraph:
    """The graph with `Edge.measured` filled in: one row of a pass for each source, so prune first.

    `replacement`: of the same prompt and coders (`ConfigError` otherwise); `against` as the graph was made.
    """
    if len(graph.tokens) != replacement.length:
        raise ConfigError(f"the graph has {len(graph.tokens)} tokens, the replacement model {replacement.length}")
    by_source: dict[int, list[int]] = defaultdict(list)
    for i, edge in enumerate(graph.edges):
        by_source[edge.source].append(i)
    base = _values(graph, replacement, [], against)[0]
    edges = list(graph.edges)
    sources = sorted(by_source)
    for start in range(0, len(sources), COPIES):
        batch = sources[start : start + COPIES]
        values = _values(graph, replacement, [graph.nodes[s] for s in batch], against)
        for row, source in enumerate(batch):
            for i in by_source[source]:
                target = edges[i].target
                edges[i] = replace(edges[i], measured=float(base[target] - values[row, target]))
    return replace(graph, edges=tuple(edges))


def vectors_of(replacement: LocalReplacement, node: Node) -> dict[str, Tensor]:
    """What a node writes at its position: {hook: [d]}. `ConfigError` for a node that this prompt does not have."""
    if node.kind == "embedding":
        return {EMBEDDINGS: replacement.embeddings[node.position].float()}
    if node.kind == "error":
        hook = next(h for h in replacement.outputs if layer_of(h)[0] == node.layer)
        return {hook: replacement.errors[hook][node.position]}
    transcoder = coder_of(replacement, node)
    active = replacement.active[transcoder.name]
    which = ((active.latents == node.latent) & (active.positions == node.position)).nonzero().squeeze(-1)
    if not len(which):
        raise ConfigError(f"latent {node.latent} of {transcoder.name!r} is silent at position {node.position}")
    parts = transcoder.parts(written(transcoder.coder, active, which))
    return {hook.name: part[0] for hook, part in zip(transcoder.writes, parts, strict=True)}


def target_of(replacement: LocalReplacement, node: Node) -> Target:
    """A latent's or a logit's node as a target; `ConfigError` for a node that nothing acts on."""
    if node.kind == "logit":
        return replacement.logit_target(node.latent)
    if node.kind != "latent":
        raise ConfigError(f"node {node.id} is no latent and no logit: nothing acts on it")
    transcoder = coder_of(replacement, node)
    active = replacement.active[transcoder.name]
    which = ((active.latents == node.latent) & (active.positions == node.position)).nonzero().squeeze(-1)
    if not len(which):
        raise ConfigError(f"latent {node.latent} of {transcoder.name!r} is silent at position {node.position}")
    return replacement.latent_target(replacement.starts[f"coder {transcoder.name}"] + int(which[0]))


def coder_of(replacement: LocalReplacement, node: Node) -> Transcoder:
    """The coder of a latent's node; `ConfigError` where there is none of its name."""
    for transcoder in replacement.transcoders:
        if transcoder.name == node.coder or (not node.coder and transcoder.layer == node.layer):
            return transcoder
    names = ", ".join(one.name for one in replacement.transcoders)
    raise ConfigError(f"node {node.id} belongs to coder {node.coder!r}; here are {names}")


def _values(
    graph: AttributionGraph, replacement: LocalReplacement, without: list[Node], against: int | None
) -> Float[Tensor, "copies nodes"]:
    """Every latent's and logit's value in copies of the prompt, each without what one node writes."""
    copies = max(1, len(without))
    removed: dict[str, Tensor] = {}
    for row, node in enumerate(without):
        for hook, vector in vectors_of(replacement, node).items():
            empty = torch.zeros(copies, replacement.length, vector.shape[-1], device=vector.device)
            removed.setdefault(hook, empty)[row, node.position] += vector
    edits = {hook: _held(hook, replacement, removed.get(hook)) for hook in (EMBEDDINGS, *replacement.outputs)}
    reads = {hook.name for one in replacement.transcoders for hook in one.reads}
    tokens = replacement.tokens.unsqueeze(0).expand(copies, -1)
    found = replacement.lm.run(tokens, edits, capture=[*reads, LAST], logits=False).activations
    values = torch.zeros(copies, len(graph.nodes))
    for i, node in enumerate(graph.nodes):
        if node.kind == "logit":
            vector = replacement.logit_target(node.latent, None if against is None else torch.tensor([against])).parts[
                0
            ][1]
            values[:, i] = (found[LAST][:, -1].float() @ vector).cpu()
        elif node.kind == "latent":
            transcoder = coder_of(replacement, node)
            x = torch.cat([found[hook.name][:, node.position] for hook in transcoder.reads], dim=-1)
            values[:, i] = _value(transcoder, x, node.latent).cpu()
    return values


def _held(hook: str, replacement: LocalReplacement, removed: Tensor | None) -> Edit:
    held = replacement.embeddings if hook == EMBEDDINGS else replacement.held[hook]

    def edit(x: Tensor) -> Tensor:
        kept = held.float().expand(x.shape[0], -1, -1)
        return (kept if removed is None else kept - removed).to(x.dtype)

    return edit


def _value(transcoder: Transcoder, x: Float[Tensor, "copies d_in"], latent: int) -> Float[Tensor, " copies"]:
    """A latent's value before any gate or cut."""
    coder = transcoder.coder
    s, _ = coder.prepare(x)
    bias = coder.input_bias()
    z = (s if bias is None else s - bias) @ coder.W_enc[latent]
    if "r_mag" in coder.extra():
        return coder.extra()["r_mag"][latent].exp() * z + coder.extra()["b_mag"][latent]
    return z + coder.b_enc[latent]
