"""Coders on the hooks of one model: named, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from unmix.coder.coder_set import CoderSet
from unmix.coder.codes import Codes
from unmix.core.errors import ModelError
from unmix.lm.points import Hook
from unmix.lm.sites import Site

if TYPE_CHECKING:
    from unmix.lm.model import LanguageModel


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
    together: str | None = None
    """Coders that have the same word here write as one: what they write to a hook adds up."""


@dataclass(frozen=True)
class Named:
    """Coders by name, and which of them write as one."""

    coders: dict[str, Coder]
    together: dict[str, str]


Bindable = Coder | CoderSet | Mapping[str, Any] | Sequence[Any]
"""A coder, a `CoderSet`, a mapping {name: either}, or a sequence of them."""


def gather(coders: Bindable) -> Named:
    """Coders by name: a mapping's keys, else each coder's own name; a set's members by theirs, after its key if any.

    `ModelError` for two of one name or for something that is no coder.
    """
    found = Named({}, {})
    if isinstance(coders, CoderSet):
        _add_set(found, "", coders)
    elif isinstance(coders, Mapping):
        for name, item in coders.items():
            _add(found, str(name), item)
    else:
        for item in [coders] if isinstance(coders, Coder) else list(coders):
            _add(found, None, item)
    return found


def _add(found: Named, name: str | None, item: Any) -> None:
    if isinstance(item, CoderSet):
        _add_set(found, "" if name is None else f"{name}/", item)
        return
    if not isinstance(item, Coder):
        raise ModelError(f"{type(item).__name__} is no coder: it lacks config, encode or decode")
    key = str(item.config.name) if name is None else name
    if key in found.coders:
        raise ModelError(f"two coders have one name ({key}); bind a mapping {{name: coder}}")
    found.coders[key] = item


def _add_set(found: Named, prefix: str, coders: CoderSet) -> None:
    word = f"set {len(set(found.together.values()))}"
    policies = [coder.config.input_policy for coder in coders.values()]
    if any(policy != policies[0] for policy in policies):
        raise ModelError("the coders of one set write as one, so all must have the same input policy")
    for member, coder in coders.items():
        _add(found, f"{prefix}{member}", coder)
        found.together[f"{prefix}{member}"] = word


def name_coders(coders: Bindable) -> dict[str, Coder]:
    """Coders by name; see `gather`. `ModelError` where there is none."""
    found = gather(coders).coders
    if not found:
        raise ModelError("there is no coder to bind")
    return found


def make_bindings(
    lm: LanguageModel, coders: Mapping[str, Coder], together: Mapping[str, str] | None = None
) -> list[Binding]:
    """Each coder on its hooks of `lm`, checked before anything runs.

    Raises `ModelError`: a hook this model lacks, widths that do not fit, a fingerprint of another architecture, two
    coders that write one place and are not `together`.
    """
    groups = together or {}
    bindings = [_make_binding(lm, name, coder, groups.get(name)) for name, coder in coders.items()]
    taken: dict[tuple[Site, int | None], Binding] = {}
    for binding in bindings:
        for hook in binding.writes:
            for (site, head), other in taken.items():
                same = site == hook.write and (head is None or hook.head is None or head == hook.head)
                if same and (binding.together is None or binding.together != other.together):
                    raise ModelError(f"coders {other.name!r} and {binding.name!r} both write {hook.name}")
            taken[hook.write, hook.head] = binding
    return bindings


def _make_binding(lm: LanguageModel, name: str, coder: Coder, together: str | None) -> Binding:
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
    return Binding(name, coder, reads, writes, widths, together)


def check_order(lm: LanguageModel, bindings: Sequence[Binding]) -> None:
    """`ModelError` for a coder that writes a hook before the last of its reads, where the order is known."""
    order = hook_order(lm)
    for binding in bindings:
        for write in binding.writes:
            if write.place not in order:
                continue
            later = [read.name for read in binding.reads if order.get(read.place, -1) > order[write.place]]
            if later:
                raise ModelError(too_early(binding.name, write.name, later))


def too_early(coder: str, write: str, missing: Sequence[str]) -> str:
    """The message for a coder whose output is needed before its inputs exist."""
    return (
        f"coder {coder!r} writes {write} before the model has reached {', '.join(missing)}, "
        "which it reads; one forward pass cannot splice it"
    )


def hook_order(lm: LanguageModel) -> dict[str, int]:
    """Place of each canonical hook in the forward pass; empty where a module's order is not known."""
    return {name: i for i, name in enumerate(lm.hooks())} if lm.is_transformers else {}


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
