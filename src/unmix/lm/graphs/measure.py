"""What edges of a graph are worth in the model itself: take out what the source writes, see what the target loses.

Attention patterns and norms answer freely; other MLPs' outputs stay what they were but for transcoders' linear skips,
so that only the direct way counts.
A linear effect that the model does not share shows here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from unmix.core.errors import ConfigError
from unmix.lm.forward import Edit, attach_read, attach_write, run
from unmix.lm.graphs.graph import AttributionGraph, Node
from unmix.lm.graphs.replacement import EMBEDDINGS, LAST, LocalReplacement, Target
from unmix.lm.graphs.transcoders import Transcoder, skipped, written
from unmix.lm.points import split_name

if TYPE_CHECKING:
    from unmix.lm.sites import Pass

COPIES = 16
"""Sources taken out in one pass, each in its own copy of the prompt, where the replacement's `memory` lets them."""


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
    base, reads = _values(graph, replacement, [], against)
    copies = _copies(replacement, len(reads))
    edges = list(graph.edges)
    sources = sorted(by_source)
    for start in range(0, len(sources), copies):
        batch = sources[start : start + copies]
        values, _ = _values(graph, replacement, [graph.nodes[s] for s in batch], against, reads)
        for row, source in enumerate(batch):
            for i in by_source[source]:
                target = edges[i].target
                edges[i] = replace(edges[i], measured=float(base[0, target] - values[row, target]))
    return replace(graph, edges=tuple(edges))


def vectors_of(replacement: LocalReplacement, node: Node) -> dict[str, Tensor]:
    """What a node writes at its position: {hook: [d]}. `ConfigError` for a node that this prompt does not have."""
    if node.kind == "embedding":
        return {EMBEDDINGS: replacement.embeddings[node.position].float()}
    if node.kind == "error":
        hook = next(h for h in replacement.outputs if split_name(h)[1] == node.layer)
        return {hook: replacement.errors[hook][node.position]}
    transcoder = coder_of(replacement, node)
    which = _entry(replacement, transcoder, node)
    parts = transcoder.parts(written(transcoder.coder, replacement.active[transcoder.name], which))
    return {hook.name: part[0] for hook, part in zip(transcoder.writes, parts, strict=True)}


def target_of(replacement: LocalReplacement, node: Node, against: int | None = None) -> Target:
    """A latent's or a logit's node as a target, `against` as the graph was made.

    `ConfigError` for a node that nothing acts on.
    """
    if node.kind == "logit":
        return replacement.logit_target(node.latent, _against(against))
    if node.kind != "latent":
        raise ConfigError(f"node {node.id} is no latent and no logit: nothing acts on it")
    transcoder = coder_of(replacement, node)
    which = _entry(replacement, transcoder, node)
    return replacement.latent_target(replacement.starts[f"coder {transcoder.name}"] + int(which[0]))


def coder_of(replacement: LocalReplacement, node: Node) -> Transcoder:
    """The coder of a latent's node; `ConfigError` where there is none of its name."""
    for transcoder in replacement.transcoders:
        if transcoder.name == node.coder or (not node.coder and transcoder.layer == node.layer):
            return transcoder
    names = ", ".join(one.name for one in replacement.transcoders)
    raise ConfigError(f"node {node.id} belongs to coder {node.coder!r}; here are {names}")


def _entry(replacement: LocalReplacement, transcoder: Transcoder, node: Node) -> Tensor:
    """The number [1] of a latent's node in its coder's `Active`; `ConfigError` where the latent is silent there."""
    active = replacement.active[transcoder.name]
    which = ((active.latents == node.latent) & (active.positions == node.position)).nonzero().squeeze(-1)
    if not len(which):
        raise ConfigError(f"latent {node.latent} of {transcoder.name!r} is silent at position {node.position}")
    return which


def _against(token: int | None) -> Tensor | None:
    return None if token is None else torch.tensor([token])


def _copies(replacement: LocalReplacement, reads: int) -> int:
    """Copies whose removed vectors and whose reads fit into the memory; at least one."""
    kept = 4 * replacement.length * replacement.lm.d_model * (reads + len(replacement.outputs) + 1)
    return max(1, min(COPIES, replacement.memory // kept))


def _values(
    graph: AttributionGraph, replacement: LocalReplacement, without: list[Node], against: int | None,
    base: dict[str, Tensor] | None = None,
) -> tuple[Float[Tensor, "copies nodes"], dict[str, Tensor]]:  # fmt: skip
    """Every latent's and logit's value in copies of the prompt, each without what one node writes; and what was read.

    `base`: what is read with nothing taken out.
    """
    lm, copies = replacement.lm, max(1, len(without))
    removed: dict[str, Tensor] = {}
    for row, node in enumerate(without):
        for hook, vector in vectors_of(replacement, node).items():
            empty = torch.zeros(copies, replacement.length, vector.shape[-1], device=vector.device)
            removed.setdefault(hook, empty)[row, node.position] += vector
    wanted = {hook.name: hook for one in replacement.transcoders for hook in one.reads} | {LAST: lm.hook(LAST)}
    found: dict[str, Tensor] = {}

    def prepare(current: Pass) -> None:
        for hook in (EMBEDDINGS, *replacement.outputs):
            attach_write(current, lm.hook(hook), _held(hook, replacement, removed.get(hook), found, base))
        for name, hook in wanted.items():
            attach_read(current, hook, lambda x, name=name: found.__setitem__(name, x))

    run(lm, replacement.tokens.unsqueeze(0).expand(copies, -1), prepare, logits=False)
    values = torch.zeros(copies, len(graph.nodes))
    for i, node in enumerate(graph.nodes):
        if node.kind == "logit":
            ((_, vector),) = replacement.logit_target(node.latent, _against(against)).parts
            values[:, i] = (found[LAST][:, -1].float() @ vector).cpu()
        elif node.kind == "latent":
            transcoder = coder_of(replacement, node)
            x = torch.cat([found[hook.name][:, node.position] for hook in transcoder.reads], dim=-1)
            values[:, i] = _value(transcoder, x, node.latent).cpu()
    return values, found


def _held(
    hook: str, replacement: LocalReplacement, removed: Tensor | None, found: dict[str, Tensor],
    base: dict[str, Tensor] | None,
) -> Edit:  # fmt: skip
    held = replacement.embeddings if hook == EMBEDDINGS else replacement.held[hook]

    def edit(x: Tensor) -> Tensor:
        kept = held.float().expand(x.shape[0], -1, -1)
        kept = kept if removed is None else kept - removed
        if base is not None:
            for one, index in replacement.skips(hook):
                moved = torch.cat([found[read.name].float() - base[read.name].float() for read in one.reads], dim=-1)
                part = one.parts(skipped(one.coder, moved))[index].float()
                kept = kept + part * replacement.counts[one.name].unsqueeze(-1)
        return kept.to(x.dtype)

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
