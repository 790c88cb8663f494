"""Passes in which a coder's latents and its error are nodes: read, moved, or made leaves of a gradient.

A *node* is a latent at a position, or the error there: what the coders that write a hook leave over of its
activation, x − Σ x̂. With `error="keep"` the model computes what it computes without coders; a node that is moved
moves the activation by as much, and coders further on decompose what reaches them. With `error="drop"` the model is
the spliced one and there are no error nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmix.coder.codes import Codes, offsets_of
from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm.forward import attach_read, attach_write, run
from unmix.lm.points import Hook
from unmix.lm.sites import Pass
from unmix.lm.splice import Binding, ErrorMode
from unmix.lm.tokens import policy_mask

if TYPE_CHECKING:
    from unmix.lm.attribute.targets import Metric
    from unmix.lm.bound import BoundModel
    from unmix.lm.model import LanguageModel

CodesRule = Callable[[Binding, Tensor], Codes]
"""(binding, its input [batch, pos, d_in]) → the codes that are decoded."""
WriteRule = Callable[[str, Tensor, Tensor], Tensor]
"""(hook, its activation x, what the coders give there) → what flows on; all [batch, pos, d]."""


@dataclass(frozen=True)
class Wiring:
    """Coders on one model, their error mode, and which of them write together."""

    lm: LanguageModel
    bindings: tuple[Binding, ...]
    error: ErrorMode
    policy_of: Callable[[Binding], InputPolicy]
    """Which positions a binding leaves alone: the policy given to `bind`, else the coder's own."""

    @property
    def writers(self) -> dict[str, list[tuple[Binding, int]]]:
        """By write hook, in the order of the bindings: who writes there, and which of its parts."""
        found: dict[str, list[tuple[Binding, int]]] = {}
        for binding in self.bindings:
            for index, hook in enumerate(binding.writes):
                found.setdefault(hook.name, []).append((binding, index))
        return found

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Names of coders that share a write hook, directly or through others; most groups hold one."""
        groups: list[set[str]] = []
        for together in self.writers.values():
            names = {binding.name for binding, _ in together}
            touched = [group for group in groups if group & names]
            groups = [group for group in groups if not group & names] + [names.union(*touched)]
        order = [binding.name for binding in self.bindings]
        listed = [tuple(name for name in order if name in group) for group in groups]
        return sorted(listed, key=lambda group: order.index(group[0]))

    def hooks_of(self, names: Sequence[str]) -> list[str]:
        """Write hooks of some coders, each once."""
        return [hook for hook, who in self.writers.items() if any(binding.name in names for binding, _ in who)]

    def binding(self, name: str) -> Binding:
        """By name."""
        return next(binding for binding in self.bindings if binding.name == name)

    def mask(self, hook: str, tokens: Tensor) -> Tensor:
        """bool [batch, pos]: where the coders of a hook look; nodes are there and nowhere else."""
        return self._mask(self.writers[hook][0][0], tokens)

    def coder_mask(self, name: str, tokens: Tensor) -> Tensor:
        """The same, by coder."""
        return self._mask(self.binding(name), tokens)

    def _mask(self, binding: Binding, tokens: Tensor) -> Tensor:
        return policy_mask(tokens, self.policy_of(binding))

    def attach(self, current: Pass, tokens: Tensor, codes: CodesRule, write: WriteRule) -> None:
        """Put the rules in place for one pass over `tokens` [batch, pos]."""
        joint = _Joint(self, codes)
        written = {hook: who[0][0].writes[who[0][1]] for hook, who in self.writers.items()}
        for binding in self.bindings:
            own = {hook.name for hook in binding.writes}
            for hook in binding.reads:
                if hook.name not in own:
                    attach_read(current, hook, lambda x, name=hook.name: joint.receive(name, x))
        for name, hook in written.items():

            def edit(x: Tensor, name: str = name) -> Tensor:
                return write(name, x, joint.output(name, x))

            attach_write(current, hook, edit, self.mask(name, tokens))


def make_wiring(bound: BoundModel) -> Wiring:
    """The wiring of a binding.

    Raises `ModelError`: interventions (they would move what is measured), a model that takes no tokens, or coders
    that write one hook and mask different positions.
    """
    if bound.interventions:
        raise ModelError(
            f"attribution is of the model as it is, and this binding holds {len(bound.interventions)} interventions; "
            "bind without them"
        )
    if bound.where != "all":
        raise ModelError(f"attribution is over whole prompts; bind with where='all' instead of {bound.where!r}")
    if not bound.lm.takes_tokens:
        raise ModelError(f"{bound.lm.name} takes no token ids, so there is nothing to attribute to")
    wiring = Wiring(bound.lm, tuple(bound.bindings), bound.error, bound.policy_of)
    for hook, who in wiring.writers.items():
        policies = {(p.skip_first, p.skip_ids) for p in (bound.policy_of(b) for b, _ in who)}
        if len(policies) > 1:
            raise ModelError(f"the coders that write {hook} mask different positions")
    return wiring


@dataclass
class _Joint:
    """One pass: each coder runs once, when the first hook it writes is reached."""

    wiring: Wiring
    rule: CodesRule
    received: dict[str, Tensor] = field(default_factory=lambda: {})
    """Hooks as they flow on, for coders that do not write them."""
    before: dict[str, Tensor] = field(default_factory=lambda: {})
    """Hooks as they arrive, for those that do."""
    parts: dict[str, list[Tensor]] = field(default_factory=lambda: {})

    def receive(self, name: str, x: Tensor) -> None:
        self.received[name] = x

    def output(self, hook: str, x: Tensor) -> Tensor:
        """What every coder that writes `hook`, whose activation is `x`, gives there, added up."""
        self.before[hook] = x
        total: Tensor | None = None
        for binding, index in self.wiring.writers[hook]:
            if binding.name not in self.parts:
                self.parts[binding.name] = self._run(binding, hook)
            part = self.parts[binding.name][index]
            total = part if total is None else total + part
        assert total is not None
        return total

    def _run(self, binding: Binding, hook: str) -> list[Tensor]:
        own = {write.name for write in binding.writes}
        seen = {read.name: (self.before if read.name in own else self.received) for read in binding.reads}
        missing = [name for name, store in seen.items() if name not in store]
        if missing:
            raise ModelError(
                f"coder {binding.name!r} writes {hook} before the model has reached {', '.join(missing)}, which it "
                "reads; one forward pass cannot splice it"
            )
        x = torch.cat([seen[read.name][read.name] for read in binding.reads], dim=-1)
        codes = self.rule(binding, x)
        return list(binding.coder.decode(codes).split(binding.widths, dim=-1))


@dataclass(frozen=True)
class State:
    """Every node's value on some contexts."""

    codes: dict[str, Codes]
    """By coder, leading [batch, pos], without gradient."""
    errors: dict[str, Tensor]
    """By write hook [batch, pos, d], in the dtype of the coders; empty with `error="drop"`."""
    metric: Tensor
    """[batch]."""


def score(wiring: Wiring, tokens: Tensor, metric: Metric, rows: Tensor, prepare: Callable[[Pass], None]) -> Tensor:
    """One pass and its metric [batch]. Gradients follow the caller's grad mode.

    A metric of one position costs the logits of that position alone.
    """
    lm = wiring.lm
    if metric.position is None or not lm.ends_in_stream(list(wiring.writers)):
        logits, _ = run(lm, tokens, prepare)
        if logits is None:
            raise ModelError(f"{lm.name} returned no logits")
        part = logits if metric.position is None else logits[:, metric.position : metric.position + 1]
        return metric(part, rows)
    seen: list[Tensor] = []
    last: Hook = lm.hook(lm.last_hook)

    def both(current: Pass) -> None:
        prepare(current)
        attach_read(current, last, seen.append)

    run(lm, tokens, both, logits=False)
    return metric(lm.unembed(seen[-1][:, metric.position : metric.position + 1]), rows)


def record(wiring: Wiring, tokens: Tensor, metric: Metric) -> State:
    """What every node is on `tokens` [batch, pos], and the metric."""
    codes: dict[str, Codes] = {}
    errors: dict[str, Tensor] = {}

    def encode(binding: Binding, x: Tensor) -> Codes:
        found = binding.coder.encode(x)
        codes[binding.name] = found.detach().nonzero()
        return found

    def write(hook: str, x: Tensor, y: Tensor) -> Tensor:
        if wiring.error == "drop":
            return y
        errors[hook] = (x.to(y.dtype) - y).detach()
        return x

    rows = torch.arange(len(tokens))
    with torch.no_grad():
        value = score(wiring, tokens, metric, rows, lambda p: wiring.attach(p, tokens, encode, write))
    kept = {name: keep_rows(found, wiring.coder_mask(name, tokens)) for name, found in codes.items()}
    return State(kept, errors, value)


def bare_metric(wiring: Wiring, tokens: Tensor, metric: Metric) -> Tensor:
    """The metric [batch] of the model without coders."""
    with torch.no_grad():
        return score(wiring, tokens, metric, torch.arange(len(tokens)), lambda _: None)


def keep_rows(codes: Codes, mask: Tensor) -> Codes:
    """`codes` without the entries of masked positions."""
    return codes.keep(mask.reshape(-1).to(codes.values.device)[codes.token_rows()])


def union(one: Codes, other: Codes) -> tuple[Codes, Tensor]:
    """Entries of either, with the values of `one`, and the values of `other` at them [nnz]. The context is `one`'s."""
    keys = torch.cat([_keys(one), _keys(other)]).unique()
    rows, ids = torch.div(keys, one.n_latents, rounding_mode="floor"), keys % one.n_latents
    offsets = offsets_of(torch.bincount(rows, minlength=one.rows))
    both = replace(one, indices=ids.to(torch.int32), values=at_keys(one, keys), offsets=offsets, uniform_k=None)
    return both, at_keys(other, keys)


def at_keys(codes: Codes, keys: Tensor) -> Tensor:
    """Values at (row · n_latents + latent) keys [n], 0 where there is no entry; gradients flow."""
    own = _keys(codes)
    if not len(own):
        return codes.values.new_zeros(len(keys))
    place = torch.searchsorted(own, keys).clamp(max=len(own) - 1)
    return torch.where(own[place] == keys, codes.values[place], 0.0)


def _keys(codes: Codes) -> Tensor:
    return codes.token_rows() * codes.n_latents + codes.indices.long()


def keys_of(codes: Codes) -> Tensor:
    """row · n_latents + latent of every entry, ascending."""
    return _keys(codes)


def decoded_hooks(wiring: Wiring, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
    """What the coders of `codes` give at each hook they write [batch, pos, d], added up."""
    total: dict[str, Tensor] = {}
    for name, own in codes.items():
        binding = wiring.binding(name)
        for hook, part in zip(binding.writes, binding.coder.decode(own).split(binding.widths, dim=-1)):
            total[hook.name] = total[hook.name] + part if hook.name in total else part
    return total
