"""The one splice (decision 8): coders' reconstructions in place of activations, inside the model's own forward.

End-to-end training, evaluation, binding and interventions all come through here. Gradients flow from the logits
to the codes, the coder's weights and every coder that ran earlier in the pass.

`error="drop"`: the reconstruction takes the activation's place.
`error="keep"`: the reconstruction plus the error it makes, x − x̂, as a constant. Values stay exactly what they were
until an intervention moves a latent; gradients still flow through the latents, and *only* through them: the error is
detached, and so is nothing else.

Coders of one `CoderSet` write as one: the value of a hook is the sum of what they write there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError, ModelError
from unmix.lm.binding import Binding, Coder, check_fingerprint, make_bindings, name_coders, too_early
from unmix.lm.forward import attach_read, attach_write
from unmix.lm.interventions.changes import Change, apply_changes
from unmix.lm.interventions.places import Fired, Fires, Span, rows_firing
from unmix.lm.points import Hook
from unmix.lm.sites import Pass

__all__ = [
    "Binding", "Coder", "ErrorMode", "SplicedPass", "attach_together", "check_fingerprint", "error_mode",
    "make_bindings", "name_coders",
]  # fmt: skip

ErrorMode = Literal["drop", "keep"]


def error_mode(value: str) -> ErrorMode:
    """`value` as an error mode; `ModelError` for anything else."""
    if value == "drop" or value == "keep":
        return value
    raise ModelError(f"error is {value!r}; allowed: drop, keep")


@dataclass
class SplicedPass:
    """What one pass does with one binding: gathers the reads, runs the coder once, hands out the parts.

    Where a module runs twice in a pass, so does the coder; `codes` are then those of the last time.
    """

    binding: Binding
    error: ErrorMode
    changes: tuple[Change, ...]
    batch: int
    span: Span
    """`length` 0: of a module that takes no tokens; each position is then a row of what reaches the coder."""
    fired: Fired | None = None
    """Answers for other coders of the pass."""
    mask: Bool[Tensor, "batch pos"] | None = None
    received: dict[str, Tensor] = field(default_factory=lambda: {})
    codes: Codes | None = None
    _clean: Codes | None = None
    _parts: tuple[list[Tensor], list[Tensor]] | None = None

    def attach(self, current: Pass, mask: Tensor | None) -> None:
        """Put the handlers in place; positions where `mask` is False pass through untouched."""
        attach_together(current, [self], mask)

    def receive(self, hook: Hook, x: Tensor) -> None:
        """One of the reads has run."""
        self._check_shape(hook, x)
        self.received[hook.name] = x
        self._clean = self._parts = None

    @property
    def unchanged(self) -> bool:
        """Whether no intervention moved a latent this time."""
        return self.codes is self._clean

    def ensure(self, hook: Hook) -> None:
        """Encode, if that has not happened since the last read; `ModelError` where a read is still missing."""
        if self._clean is not None:
            return
        missing = [read.name for read in self.binding.reads if read.name not in self.received]
        if missing:
            raise ModelError(too_early(self.binding.name, hook.name, missing))
        parts = [self.received[read.name] for read in self.binding.reads]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        self._clean = self.binding.coder.encode(x.to(getattr(self.binding.coder, "device", x.device)))
        batch, span = self.batch, self.span
        if not span.length:
            *outer, length = self._clean.leading
            batch, span = int(torch.Size(outer).numel()), Span(0, length, length)
        self.codes = apply_changes(self._clean, self.changes, batch, span, self.fired)

    def outputs(self, index: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The part of write `index` after and before interventions."""
        if self._parts is None:
            self._parts = self._decode()
        return self._parts[0][index].to(device), self._parts[1][index].to(device)

    def rows_firing(self, asked: Fires) -> Bool[Tensor, " rows"]:
        """Where a latent fires, after interventions, at positions that the coder's policy does not mask."""
        if self.codes is None:
            raise ModelError(f"{asked}: coder {self.binding.name!r} has not run yet at that point of the pass")
        rows = rows_firing(self.codes, asked.latent, asked.above)
        return rows if self.mask is None else rows & self.mask.reshape(-1).to(rows.device)

    def _decode(self) -> tuple[list[Tensor], list[Tensor]]:
        if self.codes is None or self._clean is None:
            raise ModelError(f"coder {self.binding.name!r} has not run yet")
        decode, widths = self.binding.coder.decode, self.binding.widths
        output = list(decode(self.codes).split(widths, dim=-1))
        if self.error == "drop" or self.unchanged:
            return output, output
        with torch.no_grad():
            return output, list(decode(self._clean).split(widths, dim=-1))

    def _check_shape(self, hook: Hook, x: Tensor) -> None:
        if self.span.length and tuple(x.shape[:-1]) != (self.batch, self.span.length):
            raise ModelError(
                f"{hook.name}: fired with {list(x.shape)} in a pass of [{self.batch}, {self.span.length}] tokens; "
                f"coder {self.binding.name!r} needs one row a token"
            )


def attach_together(current: Pass, members: Sequence[SplicedPass], mask: Tensor | None) -> None:
    """Put coders in place whose writes add up; positions where `mask` is False pass through untouched."""
    written = {hook.name: hook for member in members for hook in member.binding.writes}
    for member in members:
        member.mask = mask
        for hook in member.binding.reads:
            if hook.name not in written:
                attach_read(current, hook, _receiver([member], hook))
    for name, hook in written.items():
        readers = [member for member in members if any(read.name == name for read in member.binding.reads)]
        parts = [
            (member, i) for member in members for i, write in enumerate(member.binding.writes) if write.name == name
        ]
        attach_write(current, hook, _replacer(hook, _receiver(readers, hook), parts), mask)


def _receiver(members: Sequence[SplicedPass], hook: Hook) -> Callable[[Tensor], None]:
    def receive(x: Tensor) -> None:
        for member in members:
            member.receive(hook, x)

    return receive


def _replacer(
    hook: Hook, receive: Callable[[Tensor], None], parts: Sequence[tuple[SplicedPass, int]]
) -> Callable[[Tensor], Tensor]:
    keep = parts[0][0].error == "keep"

    def replace(x: Tensor) -> Tensor:
        receive(x)
        for member, _ in parts:
            member.ensure(hook)
        if keep and not torch.is_grad_enabled() and all(member.unchanged for member, _ in parts):
            return x
        found = [member.outputs(index, x.device) for member, index in parts]
        output = _sum([after for after, _ in found])
        if not keep:
            return output
        # x − x̂ would be rounded in the coder's dtype; so the difference that interventions make is added to x.
        return x.detach() + (output - _sum([before for _, before in found]).detach())

    return replace


def _sum(parts: Sequence[Any]) -> Tensor:
    total: Tensor = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def answering(passes: Sequence[SplicedPass]) -> Fired:
    """Answers `Fires` that name their coder, from the codes of this pass so far."""
    by_name = {part.binding.name: part for part in passes}

    def fired(asked: Fires) -> Tensor:
        if asked.coder not in by_name:
            raise ConfigError(f"{asked}: no such coder is bound; bound: {', '.join(by_name)}")
        return by_name[asked.coder].rows_firing(asked)

    return fired
