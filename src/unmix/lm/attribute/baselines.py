"""What a node is taken to when its effect is asked for: zero, its mean, or its value on a corrupt prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError
from unmix.lm.attribute.targets import Metric
from unmix.lm.attribute.wiring import State, Wiring, decoded_hooks, record, union

Baseline = Literal["zero", "mean", "corrupt"]


@dataclass(frozen=True)
class Means:
    """Mean value of every node over positions, from `mean_nodes`."""

    codes: dict[str, Tensor]
    """By coder [n_latents]."""
    errors: dict[str, Tensor]
    """By write hook [d]."""
    positions: int


@dataclass(frozen=True)
class Nodes:
    """Every node of some contexts, its value and its baseline."""

    codes: dict[str, Codes]
    """By coder, leading [batch, pos]: an entry wherever value or baseline is not 0."""
    bases: dict[str, Tensor]
    """Baseline of every entry [nnz]."""
    errors: dict[str, Tensor]
    """By write hook [batch, pos, d]."""
    error_bases: dict[str, Tensor]
    masks: dict[str, Tensor]
    """By write hook, bool [batch, pos]: where there are nodes."""
    metric: Tensor
    """[batch], with nothing moved."""
    kind: Baseline


def mean_nodes(wiring: Wiring, tokens: Tensor, batch: int = 8) -> Means:
    """Means over the positions of `tokens` [n, pos] that the coders look at."""
    totals: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    counts: dict[tuple[str, str], int] = {}
    nothing = Metric("nothing", "function", None, function=lambda logits: logits[:, 0, 0])
    for part in tokens.split(batch):
        state = record(wiring, part, nothing)
        for name, codes in state.codes.items():
            zero = totals.get(name, codes.values.new_zeros(codes.n_latents))
            totals[name] = zero.index_add(0, codes.indices.long(), codes.values)
            counts["coder", name] = counts.get(("coder", name), 0) + int(wiring.coder_mask(name, part).sum())
        for hook, error in state.errors.items():
            mask = wiring.mask(hook, part)
            errors[hook] = errors.get(hook, 0.0) + error[mask].sum(0)
            counts["hook", hook] = counts.get(("hook", hook), 0) + int(mask.sum())
    if not all(counts.values()):
        raise ConfigError("means need tokens at positions that the coders look at")
    return Means(
        {name: total / counts["coder", name] for name, total in totals.items()},
        {hook: total / counts["hook", hook] for hook, total in errors.items()},
        min(counts.values()),
    )


@torch.no_grad()
def make_nodes(
    wiring: Wiring, tokens: Tensor, metric: Metric, corrupt: Tensor | None = None, means: Means | None = None
) -> Nodes:
    """The nodes of `tokens` [batch, pos]; baselines from `corrupt` of that shape, from `means`, else zero."""
    state = record(wiring, tokens, metric)
    if corrupt is not None and means is not None:
        raise ConfigError("baselines come from a corrupt prompt or from means, not from both")
    masks = {hook: wiring.mask(hook, tokens) for hook in wiring.writers}
    if corrupt is not None:
        codes, bases, errors = _from_corrupt(wiring, state, tokens, corrupt, metric)
        kind: Baseline = "corrupt"
    elif means is not None:
        codes, bases = {}, {}
        for name, own in state.codes.items():
            codes[name], bases[name] = union(own, _everywhere(own, means.codes[name], wiring.coder_mask(name, tokens)))
        errors = {hook: means.errors[hook].expand_as(error) for hook, error in state.errors.items()}
        kind = "mean"
    else:
        codes, kind = state.codes, "zero"
        bases = {name: torch.zeros_like(own.values) for name, own in codes.items()}
        errors = {hook: torch.zeros_like(error) for hook, error in state.errors.items()}
    return Nodes(codes, bases, state.errors, errors, masks, state.metric, kind)


def _from_corrupt(
    wiring: Wiring, state: State, tokens: Tensor, corrupt: Tensor, metric: Metric
) -> tuple[dict[str, Codes], dict[str, Tensor], dict[str, Tensor]]:
    """Entries of either prompt, and errors such that all baselines together are the corrupt activation.

    Coders that normalise decode with facts of each token; those of the clean prompt are kept, and what that changes
    goes to the error.
    """
    if corrupt.shape != tokens.shape:
        raise ConfigError(
            f"the corrupt prompt has {list(corrupt.shape)} tokens, the prompt {list(tokens.shape)}: "
            "patching needs one position for another"
        )
    other = record(wiring, corrupt, metric)
    codes: dict[str, Codes] = {}
    bases: dict[str, Tensor] = {}
    for name, own in state.codes.items():
        codes[name], bases[name] = union(own, other.codes[name])
    if not state.errors:
        return codes, bases, {}
    there = decoded_hooks(wiring, other.codes)
    here = decoded_hooks(wiring, {name: replace(own, values=bases[name]) for name, own in codes.items()})
    return codes, bases, {hook: error + there[hook] - here[hook] for hook, error in other.errors.items()}


def _everywhere(codes: Codes, mean: Tensor, mask: Tensor) -> Codes:
    """`mean` [n_latents] as codes of every position that counts; as many entries as there are means that are not 0."""
    (alive,) = mean.nonzero(as_tuple=True)
    rows = mask.reshape(-1).to(mean.device)
    lengths = rows.long() * len(alive)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    count = int(rows.sum())
    return replace(
        codes, indices=alive.to(torch.int32).repeat(count), values=mean[alive].repeat(count), offsets=offsets,
        uniform_k=None,
    )  # fmt: skip


def group_values(nodes: Nodes, share: float, mapping: Mapping[str, Codes]) -> dict[str, Codes]:
    """Codes `share` of the way from the baselines (0) to the values (1)."""
    return {
        name: replace(own, values=nodes.bases[name] + share * (own.values - nodes.bases[name]))
        for name, own in mapping.items()
    }
