"""The one splice (decision 8): coders' reconstructions in place of activations, inside the model's own forward.

End-to-end training, evaluation, binding and interventions all come through here. Gradients flow from the logits
to the codes, the coder's weights and every coder that ran earlier in the pass.

`error="drop"`: the reconstruction takes the activation's place.
`error="keep"`: the reconstruction plus the error it makes, x − x̂, as a constant. Values stay what they were (to
rounding) until an intervention moves a latent; gradients still flow through the latents, and *only* through them:
the error is detached, and so is nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ModelError
from unmix.lm.forward import attach_read, attach_write
from unmix.lm.intervene import Intervention, Span, apply_all
from unmix.lm.points import Hook
from unmix.lm.sites import Pass, Site

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel

ErrorMode = Literal["drop", "keep"]


def error_mode(value: str) -> ErrorMode:
    """`value` as an error mode; `ModelError` for anything else."""
    if value == "drop" or value == "keep":
        return value
    raise ModelError(f"error is {value!r}; allowed: drop, keep")


@runtime_checkable
class Coder(Protocol):
    """What the splice needs of a coder: `SparseCoder` and everything shaped like it."""

    @property
    def config(self) -> Any:
        """A `CoderConfig`: name, reads, writes, d_in, width_out, n_latents, input_policy, model."""
        ...

    def encode(self, x: Tensor) -> Codes:
        """Codes of `x` [..., d_in]."""
        ...

    def decode(self, codes: Codes) -> Tensor:
        """The output [..., d_out]."""
        ...


@dataclass(frozen=True)
class Binding:
    """A coder with its hooks resolved on one model."""

    name: str
    coder: Coder
    reads: tuple[Hook, ...]
    writes: tuple[Hook, ...]
    widths: tuple[int, ...]
    """Widths of the writes."""


@dataclass
class SplicedPass:
    """What one pass does with one binding: gathers the reads, runs the coder once, hands out the parts."""

    binding: Binding
    error: ErrorMode
    acts: tuple[Intervention, ...]
    batch: int
    span: Span
    received: dict[str, Tensor] = field(default_factory=lambda: {})
    codes: Codes | None = None
    parts: tuple[list[Tensor], list[Tensor]] | None = None

    def attach(self, current: Pass, mask: Tensor | None) -> None:
        """Put the handlers in place; positions where `mask` is False pass through untouched."""
        written = {hook.name for hook in self.binding.writes}
        for hook in self.binding.reads:
            if hook.name not in written:
                attach_read(current, hook, lambda x, name=hook.name: self._receive(name, x))
        for index, hook in enumerate(self.binding.writes):
            attach_write(current, hook, lambda x, i=index: self._replace(i, x), mask)

    def _receive(self, name: str, x: Tensor) -> None:
        self.received[name] = x

    def _replace(self, index: int, x: Tensor) -> Tensor:
        hook = self.binding.writes[index]
        if any(hook.name == read.name for read in self.binding.reads):
            self._receive(hook.name, x)
        if self.parts is None:
            self.parts = self._run(hook)
        output, clean = self.parts[0][index], self.parts[1][index]
        if self.error == "drop":
            return output
        return output + (x.to(output.dtype) - clean).detach()

    def _run(self, hook: Hook) -> tuple[list[Tensor], list[Tensor]]:
        """The coder's output after and before interventions, cut by write hook."""
        missing = [read.name for read in self.binding.reads if read.name not in self.received]
        if missing:
            raise ModelError(
                f"coder {self.binding.name!r} writes {hook.name} before the model has reached {', '.join(missing)}, "
                "which it reads; one forward pass cannot splice it"
            )
        coder = self.binding.coder
        x = torch.cat([self.received[read.name] for read in self.binding.reads], dim=-1)
        codes = coder.encode(x)
        self.codes = apply_all(codes, self.acts, self.batch, self.span)
        output = list(coder.decode(self.codes).split(self.binding.widths, dim=-1))
        if self.error == "drop" or self.codes is codes:
            return output, output
        with torch.no_grad():
            return output, list(coder.decode(codes).split(self.binding.widths, dim=-1))


def name_coders(coders: Coder | Mapping[str, Coder] | Sequence[Coder]) -> dict[str, Coder]:
    """Coders by name: a mapping's keys, else each coder's own. `ModelError` for two of one name or for none."""
    if isinstance(coders, Mapping):
        named = dict(coders)
    else:
        listed: list[Coder] = [coders] if isinstance(coders, Coder) else list(coders)
        named = {coder.config.name: coder for coder in listed}
        if len(named) < len(listed):
            names = ", ".join(coder.config.name for coder in listed)
            raise ModelError(f"two coders have one name ({names}); bind a mapping {{name: coder}}")
    if not named:
        raise ModelError("there is no coder to bind")
    return named


def make_bindings(lm: LanguageModel, coders: Mapping[str, Coder]) -> list[Binding]:
    """Each coder on its hooks of `lm`, checked before anything runs.

    Raises `ModelError`: a hook this model lacks, widths that do not fit, a fingerprint of another architecture,
    two coders that write one place, a coder on another device.
    """
    bindings = [_make_binding(lm, name, coder) for name, coder in coders.items()]
    taken: dict[tuple[Site, int | None], str] = {}
    for binding in bindings:
        for hook in binding.writes:
            for (site, head), other in taken.items():
                if site == hook.write and (head is None or hook.head is None or head == hook.head):
                    raise ModelError(f"coders {other!r} and {binding.name!r} both write {hook.name}")
            taken[hook.write, hook.head] = binding.name
    return bindings


def _make_binding(lm: LanguageModel, name: str, coder: Coder) -> Binding:
    config = coder.config
    check_fingerprint(lm, name, coder)
    reads = tuple(lm.hook(spec) for spec in config.reads)
    writes = tuple(lm.hook(spec) for spec in config.writes)
    read_widths = [lm.width(hook.name) for hook in reads]
    widths = tuple(lm.width(hook.name) for hook in writes)
    for verb, hooks, found, expected in (
        ("reads", reads, read_widths, config.d_in), ("writes", writes, list(widths), config.width_out),
    ):  # fmt: skip
        if sum(found) != expected:
            places = " + ".join(hook.name for hook in hooks)
            raise ModelError(
                f"coder {name!r} {verb} {expected} values at {places}, which is {' + '.join(map(str, found))} wide "
                f"in {lm.name}"
            )
    device = getattr(coder, "device", lm.device)
    if device != lm.device:
        raise ModelError(f"coder {name!r} is on {device}, the model on {lm.device}: move one of them")
    return Binding(name, coder, reads, writes, widths)


def check_fingerprint(lm: LanguageModel, name: str, coder: Coder) -> None:
    """`ModelError` where the coder was made for another architecture; a warning for another model of the same one."""
    from unmix.core.progress import log

    made_for = coder.config.model
    if made_for is None:
        return
    here = lm.fingerprint
    for part in ("family", "n_layers", "d_model", "vocab_size"):
        expected, found = getattr(made_for, part), getattr(here, part)
        if expected is not None and expected != found:
            raise ModelError(
                f"coder {name!r} was trained on {made_for.name} ({part} {expected}); {here.name} has {part} {found}"
            )
    hashes = (made_for.weights_hash, here.weights_hash)
    if None not in hashes and hashes[0] != hashes[1]:
        log.warning("coder %r was trained on %s; %s has other weights", name, made_for.name, here.name)
    elif not made_for.same_name(here.name) and None in hashes:
        log.warning("coder %r was trained on %s; this model is %s", name, made_for.name, here.name)
