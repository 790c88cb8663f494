"""Interventions checked against what is bound, with their numbers, before any pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unmix.core.errors import ConfigError, ModelError
from unmix.lm.binding import Binding, hook_order
from unmix.lm.forward import attach_write
from unmix.lm.interventions.acts import Intervention, LatentIntervention
from unmix.lm.interventions.changes import Change, LatentFacts, as_change
from unmix.lm.interventions.distribution import Distribution
from unmix.lm.interventions.places import Fired, Fires, Span, Where, columns_where, rows_where
from unmix.lm.interventions.steering import Steer
from unmix.lm.points import Hook
from unmix.lm.sites import Pass

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


@dataclass(frozen=True)
class Push:
    """A vector on its way to a hook of the model."""

    hook: Hook
    vector: Float[Tensor, " d"]
    where: Where
    coder: str | None = None
    """Whose policy masks positions, where it is a latent's direction."""

    def attach(self, current: Pass, batch: int, span: Span, fired: Fired, masks: Mapping[str, Tensor | None]) -> None:
        """Add the vector at `where`; other positions keep their value bit for bit."""
        if not span.touches(self.where) or self._waits_for(masks):
            return
        known = None if self.coder is None else masks.get(self.coder)
        if isinstance(self.where, Fires):
            attach_write(current, self.hook, lambda x: self._where_fired(x, batch, span, fired, known))
        elif not span.length:
            attach_write(current, self.hook, lambda x: x + self.vector.to(x.device))
        else:
            device = self.vector.device if known is None else known.device
            columns = columns_where(self.where, batch, span, device)
            columns = columns if known is None else columns & known
            attach_write(current, self.hook, lambda x: x + self.vector.to(x.device), columns)

    def _waits_for(self, masks: Mapping[str, Tensor | None]) -> bool:
        """Whether it hangs on a coder that is not spliced into this pass (`bind(..., where="prompt")`, later on)."""
        asked = self.where.coder if isinstance(self.where, Fires) else None
        return any(name is not None and name not in masks for name in (self.coder, asked))

    def _where_fired(self, x: Tensor, batch: int, span: Span, fired: Fired, mask: Tensor | None) -> Tensor:
        rows = rows_where(self.where, batch, span, x.device, fired)
        chosen: Bool[Tensor, "batch length 1"] = rows.reshape(batch, span.length, 1)
        chosen = chosen if mask is None else chosen & mask.to(x.device).unsqueeze(-1)
        return torch.where(chosen, x + self.vector.to(x.device), x) if bool(chosen.any()) else x


@dataclass(frozen=True)
class Plan:
    """What passes of a binding do, in order."""

    changes: Mapping[str, tuple[Change, ...]]
    """By coder."""
    pushes: tuple[Push, ...]


class Planner:
    """Turns interventions into plans for one set of bindings."""

    def __init__(
        self, lm: LanguageModel, bindings: Sequence[Binding], distributions: Mapping[str, Distribution]
    ) -> None:
        self.lm = lm
        self.bindings = {binding.name: binding for binding in bindings}
        self.facts = {
            name: LatentFacts(
                name, binding.coder.config.n_latents, getattr(binding.coder, "statistics", {}),
                distributions.get(name),
            )
            for name, binding in self.bindings.items()
        }  # fmt: skip

    def plan(self, interventions: Sequence[Intervention]) -> Plan:
        """Every intervention in order.

        `ModelError`: a coder that is not bound or not named where it must be, a latent out of range, a vector that does
        not fit its hook, a condition on a coder that runs later. `ConfigError`: missing means or distributions.
        """
        changes: dict[str, list[Change]] = {name: [] for name in self.bindings}
        pushes: list[Push] = []
        for act in interventions:
            if isinstance(act, LatentIntervention):
                binding = self._binding(act, act.coder)
                self._in_range(act, binding, max(act.latents))
                act = replace(act, where=self._where(act, binding.writes, binding.name))
                changes[binding.name].append(as_change(act, self.facts[binding.name]))
            elif isinstance(act, Steer):
                pushes += self._pushes(act)
            else:
                raise ConfigError(f"{type(act).__name__} is no intervention that a binding knows")
        return Plan({name: tuple(found) for name, found in changes.items()}, tuple(pushes))

    def _pushes(self, act: Steer) -> list[Push]:
        if act.latent is not None:
            binding = self._binding(act, act.coder)
            self._in_range(act, binding, act.latent)
            return self._along(act, binding, act.latent)
        hook = self.lm.hook(str(act.hook))
        vector, width = act.direction(), self.lm.width(hook.name)
        if len(vector) != width:
            raise ModelError(f"{act!r}: {hook.name} of {self.lm.name} is {width} wide")
        where = self._where(act, (hook,), None)
        return [Push(hook, act.scale * _wide(vector).to(self.lm.device), where)]

    def _along(self, act: Steer, binding: Binding, latent: int) -> list[Push]:
        """Of a row alone: `dictionary` would be a second dictionary in memory."""
        rows = getattr(binding.coder, "W_dec", None)
        if not isinstance(rows, Tensor):
            raise ModelError(f"{act!r}: coder {binding.name!r} has no decoder rows to take a direction from")
        row = torch.nn.functional.normalize(_wide(rows[latent].detach()), dim=-1)
        parts = (act.scale * row.to(self.lm.device)).split(binding.widths)
        where = self._where(act, binding.writes, binding.name)
        return [Push(hook, part, where, binding.name) for hook, part in zip(binding.writes, parts, strict=True)]

    def _binding(self, act: Intervention, name: str | None) -> Binding:
        bound = ", ".join(self.bindings)
        if not self.bindings:
            raise ModelError(f"{act}: no coder is bound; only vectors can be added")
        if name is None and len(self.bindings) > 1:
            raise ModelError(f"{act}: several coders are bound; name one of {bound} in `coder`")
        if name is not None and name not in self.bindings:
            raise ModelError(f"{act}: no coder {name!r} is bound; bound: {bound}")
        return next(iter(self.bindings.values())) if name is None else self.bindings[name]

    def _in_range(self, act: object, binding: Binding, latent: int) -> None:
        n_latents = binding.coder.config.n_latents
        if latent >= n_latents:
            raise ModelError(f"{act}: coder {binding.name!r} has latents 0 to {n_latents - 1}")

    def _where(self, act: Intervention, written: Sequence[Hook], own: str | None) -> Where:
        """The places of `act`, a condition's coder named and known to run before the first of `written`."""
        where = act.where
        if not isinstance(where, Fires):
            return where
        # A latent of an intervention's own coder is looked at in the codes that it changes.
        seen = self._binding(act, where.coder or own)
        self._in_range(act, seen, where.latent)
        order = hook_order(self.lm)
        known = [order[hook.place] for hook in written if hook.place in order]
        runs = [order[hook.place] for hook in seen.writes if hook.place in order]
        if seen.name != own and known and runs and min(runs) > min(known):
            raise ModelError(f"{act}: coder {seen.name!r} runs after {written[0].name}, so what fires in it comes late")
        return replace(where, coder=seen.name)


def _wide(vector: Tensor) -> Tensor:
    return vector if vector.dtype == torch.float64 else vector.float()
