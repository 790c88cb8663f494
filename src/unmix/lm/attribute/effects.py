"""The effect of every node on a metric: m as it is, minus m with the node at its baseline.

`gradient` estimates all of them from one backward pass: slope × (value − baseline). With a corrupt baseline that is
attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348). `integrated` averages the slope over the way
from baseline to value (Sundararajan et al. 2017; Marks et al. 2024, arXiv 2403.19647 §3.1), one group of coders that
write together at a time; its effects add up to the difference the whole group makes. `patched` measures: one node at
its baseline, one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.lm.attribute.baselines import Nodes
from unmix.lm.attribute.targets import Metric
from unmix.lm.attribute.wiring import CodesRule, Wiring, WriteRule, at_keys, keys_of, score
from unmix.lm.forward import attach_write
from unmix.lm.sites import Pass
from unmix.lm.splice import Binding


@dataclass(frozen=True)
class Completeness:
    """How well the effects of a group of coders add up, summed over contexts."""

    effects: float
    """Of all the group's nodes."""
    measured: float
    """m as it is, minus m with all of them at their baselines at once."""

    @property
    def gap(self) -> float:
        """effects − measured; 0 for an exact path integral."""
        return self.effects - self.measured


@dataclass(frozen=True)
class Effects:
    """Effects of `Nodes`, entry for entry; NaN where a node was left out."""

    latents: dict[str, Tensor]
    """By coder [nnz]."""
    errors: dict[str, Tensor]
    """By write hook [batch, pos]; 0 at masked positions."""
    latent_slopes: dict[str, Tensor]
    """Mean gradient by entry [nnz]; empty for `patched`."""
    error_slopes: dict[str, Tensor]
    """[batch, pos, d]."""
    completeness: dict[str, Completeness]
    """By group, its coders' names joined by ` + `."""


def gradient(wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes) -> Effects:
    """Slope × (value − baseline) of every node, from one forward and one backward pass.

    Slopes are those of the whole way to the metric, through nodes of later coders too.
    """
    leaves, errors = _leaves(wiring, nodes, [b.name for b in wiring.bindings])
    if wiring.error == "keep":

        def encode(binding: Binding, x: Tensor) -> Codes:
            return replace(nodes.codes[binding.name], values=leaves[binding.name])

        def write(hook: str, x: Tensor, y: Tensor) -> Tensor:
            # The value is that of the nodes; what came before reaches it as it does in the model without coders.
            return y + errors[hook] + (x - x.detach()).to(y.dtype)
    else:

        def encode(binding: Binding, x: Tensor) -> Codes:
            own, current = nodes.codes[binding.name], binding.coder.encode(x)
            moved = leaves[binding.name] - own.values
            return replace(own, values=at_keys(current, keys_of(own)) + moved, context=current.context)

        def write(hook: str, x: Tensor, y: Tensor) -> Tensor:
            return y

    slopes, error_slopes = _slopes(wiring, tokens, metric, leaves, errors, encode, write)
    return _multiply(wiring, nodes, slopes, error_slopes, {})


def integrated(wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes, steps: int = 16) -> Effects:
    """Integrated gradients over `steps` points, group by group: all nodes of a group move together.

    The points are Gauss and Legendre's: what is smooth on the way needs few. A norm that is handed next to nothing near
    the baseline, or a later coder whose latents come and go (`error="drop"`), is not smooth; `completeness` tells.
    Inside a group of several coders effects are direct ones: what a latent does to the codes of its group's other
    coders is not counted.
    """
    slopes: dict[str, Tensor] = {}
    error_slopes: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}
    for group in wiring.groups:
        for share, weight in _quadrature(steps):
            found, found_errors = _group_pass(wiring, tokens, metric, nodes, group, share)
            for store, new in ((slopes, found), (error_slopes, found_errors)):
                for name, slope in new.items():
                    store[name] = store[name] + weight * slope if name in store else weight * slope
        ends[" + ".join(group)] = group_metric(wiring, tokens, metric, nodes, group)
    return _multiply(wiring, nodes, slopes, error_slopes, ends)


def _quadrature(steps: int) -> list[tuple[float, float]]:
    """(place, weight) on 0 to 1."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    return [((float(place) + 1) / 2, float(weight) / 2) for place, weight in zip(places, weights)]


def group_metric(
    wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes, group: Sequence[str], share: float = 0.0
) -> Float[Tensor, " batch"]:
    """The metric with every node of `group` at `share` of the way from its baseline to its value."""
    leaves, errors = _leaves(wiring, nodes, group, share)
    encode, write = _group_rules(wiring, nodes, group, leaves, errors)
    only = _only(wiring, group)
    with torch.no_grad():
        return score(wiring, tokens, metric, _all(tokens), lambda p: only.attach(p, tokens, encode, write))


def patched(
    wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes, batch: int = 16, limit: int | None = None
) -> Effects:
    """Measured effects: each node at its baseline in a pass of its own, `batch` of them at a time.

    `limit`: only the strongest by `gradient` are measured; the others are NaN. Decoding must be affine in the
    latents' values, as it is for every coder here.
    """
    floor = -1.0
    guess: Effects | None = None
    if limit is not None:
        guess = gradient(wiring, tokens, metric, nodes)
        sizes = torch.cat([e.abs().reshape(-1) for e in (*guess.latents.values(), *guess.errors.values())])
        floor = float(sizes.topk(min(limit, len(sizes))).values[-1]) if limit and len(sizes) else float("inf")
        # What cannot reach the metric (whatever comes after its position, say) is none of the strongest.
        floor = max(floor, torch.finfo(torch.float32).tiny)
    latents: dict[str, Tensor] = {}
    for name, codes in nodes.codes.items():
        chosen = torch.arange(codes.nnz) if guess is None else (guess.latents[name].abs() >= floor).nonzero()[:, 0]
        latents[name] = torch.full((codes.nnz,), float("nan"))
        for some in chosen.split(batch):
            deltas = _latent_deltas(wiring, nodes, name, some)
            rows = codes.token_rows()[some].cpu()
            latents[name][some] = _measure(wiring, tokens, metric, nodes, rows, deltas)
    errors: dict[str, Tensor] = {}
    for hook, error in nodes.errors.items():
        wanted = nodes.masks[hook].reshape(-1).cpu()
        errors[hook] = torch.where(wanted, float("nan"), 0.0)
        if guess is not None:
            wanted = wanted & (guess.errors[hook].reshape(-1) >= floor).cpu() | (
                wanted & (guess.errors[hook].reshape(-1) <= -floor).cpu()
            )
        moved = (nodes.error_bases[hook] - error).flatten(0, 1)
        for some in wanted.nonzero()[:, 0].split(batch):
            errors[hook][some] = _measure(wiring, tokens, metric, nodes, some, {hook: moved[some]})
        errors[hook] = errors[hook].view(error.shape[:2])
    return Effects(latents, errors, {}, {}, {})


def _leaves(
    wiring: Wiring, nodes: Nodes, names: Sequence[str], share: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of the latents and errors of some coders, as leaves that take a gradient."""
    leaves: dict[str, Tensor] = {}
    for name in names:
        base = nodes.bases[name]
        leaves[name] = (base + share * (nodes.codes[name].values - base)).detach().requires_grad_()
    errors: dict[str, Tensor] = {}
    for hook in wiring.hooks_of(names) if nodes.errors else ():
        base = nodes.error_bases[hook]
        errors[hook] = (base + share * (nodes.errors[hook] - base)).detach().requires_grad_()
    return leaves, errors


def _slopes(
    wiring: Wiring, tokens: Tensor, metric: Metric, leaves: dict[str, Tensor], errors: dict[str, Tensor],
    encode: CodesRule, write: WriteRule,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Gradients of the metric, summed over contexts, at the leaves."""
    with torch.enable_grad():
        value = score(wiring, tokens, metric, _all(tokens), lambda p: wiring.attach(p, tokens, encode, write)).sum()
        wanted = [*leaves.values(), *errors.values()]
        if not value.requires_grad:
            # No node reaches the metric: all are masked, or a user's function gave a constant.
            found = tuple(torch.zeros_like(leaf) for leaf in wanted)
        else:
            found = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    split = len(leaves)
    return dict(zip(leaves, found[:split])), dict(zip(errors, found[split:]))


def _only(wiring: Wiring, group: Sequence[str]) -> Wiring:
    """The wiring of one group's pass: where errors are kept the other coders change nothing, so they are left out."""
    if wiring.error == "drop":
        return wiring
    return replace(wiring, bindings=tuple(b for b in wiring.bindings if b.name in group))


def _group_rules(
    wiring: Wiring, nodes: Nodes, group: Sequence[str], leaves: dict[str, Tensor], errors: dict[str, Tensor]
) -> tuple[CodesRule, WriteRule]:
    def encode(binding: Binding, x: Tensor) -> Codes:
        if binding.name not in group:
            return binding.coder.encode(x)
        return replace(nodes.codes[binding.name], values=leaves[binding.name])

    def write(hook: str, x: Tensor, y: Tensor) -> Tensor:
        return y + errors[hook] if hook in errors else y

    return encode, write


def _group_pass(
    wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes, group: Sequence[str], share: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves, errors = _leaves(wiring, nodes, group, share)
    encode, write = _group_rules(wiring, nodes, group, leaves, errors)
    return _slopes(_only(wiring, group), tokens, metric, leaves, errors, encode, write)


def _multiply(
    wiring: Wiring, nodes: Nodes, slopes: dict[str, Tensor], error_slopes: dict[str, Tensor], ends: dict[str, Tensor]
) -> Effects:
    latents = {name: slope * (nodes.codes[name].values - nodes.bases[name]) for name, slope in slopes.items()}
    errors: dict[str, Tensor] = {}
    for hook, slope in error_slopes.items():
        moved = (slope * (nodes.errors[hook] - nodes.error_bases[hook])).sum(-1)
        errors[hook] = torch.where(nodes.masks[hook].to(moved.device), moved, 0.0)
    completeness: dict[str, Completeness] = {}
    for group in wiring.groups if ends else ():
        key = " + ".join(group)
        parts = [latents[name] for name in group] + [errors[hook] for hook in wiring.hooks_of(group) if hook in errors]
        total = sum(float(part.double().sum()) for part in parts)
        completeness[key] = Completeness(total, float((nodes.metric - ends[key]).double().sum()))
    cpu = {name: effect.detach().float().cpu() for name, effect in latents.items()}
    return Effects(
        cpu,
        {hook: effect.detach().float().cpu() for hook, effect in errors.items()},
        slopes,
        error_slopes,
        completeness,
    )


def _latent_deltas(wiring: Wiring, nodes: Nodes, name: str, entries: Tensor) -> dict[str, Tensor]:
    """By hook, how the activation moves when an entry is taken to its baseline, for each of `entries` [n] → [n, d]."""
    codes, binding = nodes.codes[name], wiring.binding(name)
    some = entries.to(codes.values.device)
    rows = codes.token_rows()[some]
    moved = (nodes.bases[name] - codes.values)[some]
    one = replace(
        codes.select(rows), indices=codes.indices[some], values=moved, uniform_k=1,
        offsets=torch.arange(len(some) + 1, device=some.device),
    )  # fmt: skip
    with torch.no_grad():
        whole = binding.coder.decode(one) - binding.coder.decode(replace(one, values=torch.zeros_like(moved)))
    parts = whole.split(binding.widths, dim=-1)
    return {hook.name: part for hook, part in zip(binding.writes, parts)}


def _measure(
    wiring: Wiring, tokens: Tensor, metric: Metric, nodes: Nodes, rows: Tensor, deltas: dict[str, Tensor]
) -> Tensor:
    """Effects [n]: `rows` [n] of the flattened contexts, each moved by `deltas` at its own place, in n copies."""
    length = tokens.shape[1]
    contexts, places = torch.div(rows, length, rounding_mode="floor"), rows % length
    copies = tokens[contexts.to(tokens.device)]
    each = torch.arange(len(rows))

    def move(hook: str, x: Tensor) -> Tensor:
        new = x.clone()
        new[each, places] = (new[each, places].to(deltas[hook].dtype) + deltas[hook]).to(x.dtype)
        return new

    def write(hook: str, x: Tensor, y: Tensor) -> Tensor:
        return move(hook, y) if hook in deltas else y

    def prepare(current: Pass) -> None:
        if wiring.error == "drop":
            wiring.attach(current, copies, lambda binding, x: binding.coder.encode(x), write)
            return
        for hook in deltas:
            edit: Callable[[Tensor], Tensor] = lambda x, hook=hook: move(hook, x)  # noqa: E731
            attach_write(current, wiring.lm.hook(hook), edit)

    with torch.no_grad():
        value = score(wiring, copies, metric, contexts, prepare)
    return (nodes.metric[contexts.to(nodes.metric.device)] - value).float().cpu()


def _all(tokens: Tensor) -> Tensor:
    return torch.arange(len(tokens))
