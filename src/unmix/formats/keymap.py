"""Declarative key maps: which stored tensor is which parameter, of what shape, through which transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmix.core.errors import FormatError, NonFiniteError
from unmix.formats.lazy import Lazy, State, apply
from unmix.formats.place import Place
from unmix.formats.stores import Header, Store, is_finite
from unmix.formats.transforms import TRANSFORMS

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Stored:
    """One tensor of a layout."""

    key: str
    """Its name in the file."""
    name: str
    """The coder's name for it. Several entries may share one: alternatives, of which one must be there."""
    dims: tuple[str, ...]
    """Its stored shape, by names of sizes (`("d_in", "n_latents")`); empty for a scalar."""
    transform: str = "same"
    optional: bool = False
    kind: Literal["weight", "statistic", "ignored"] = "weight"
    """A weight is a parameter, in float32. A statistic is kept beside them as stored. An ignored one is not read."""


@dataclass(frozen=True)
class Found:
    """What a file holds of a key map."""

    state: State
    statistics: dict[str, Lazy]
    sizes: dict[str, int]
    """Every size that the shapes say, besides those that were given."""


def read_state(
    place: Place,
    file: str,
    keymap: Sequence[Stored],
    sizes: Mapping[str, int] | None = None,
    source: str = "the config",
    prefix: str = "",
    whole: bool = True,
) -> Found:
    """The coder's tensors, not made yet; weights in float32.

    Names and shapes are checked on the file's header now: `FormatError` for a missing or unknown tensor, a wrong shape
    (`sizes` are what `source` says; a size that nobody said is taken from the first tensor that has it) or dtype.
    NaN and infinity are looked for when a tensor is made: `NonFiniteError`. `prefix` stands before every key; with
    `whole` False the file may hold other tensors too.
    """
    store = place.store(file)
    headers = {k[len(prefix) :]: h for k, h in store.headers().items() if k.startswith(prefix)}
    where = f"{place.shown}: {file}"
    if whole:
        _refuse_unknown(where, keymap, set(store.headers()), prefix)
    known = dict(sizes or {})
    said = dict.fromkeys(known, source)
    state: State = {}
    statistics: dict[str, Lazy] = {}
    for entry in _choose(where, keymap, headers, known, prefix):
        header = headers[entry.key]
        _check(where, entry, header, known, said, prefix)
        if entry.kind == "weight":
            state[entry.name] = apply(
                TRANSFORMS[entry.transform].read, _weight(where, store, prefix + entry.key, header)
            )
        elif entry.kind == "statistic":
            statistics[entry.name] = _statistic(store, prefix + entry.key, header)
    return Found(state, statistics, known)


def write_state(state: Mapping[str, Lazy], keymap: Sequence[Stored]) -> dict[str, Lazy]:
    """The stored tensors of `state`: of alternatives the first is written, optional ones where they are there."""
    stored: dict[str, Lazy] = {}
    written: set[str] = set()
    for entry in keymap:
        if entry.kind == "weight" and entry.name not in written and not (entry.optional and entry.name not in state):
            written.add(entry.name)
            stored[entry.key] = apply(TRANSFORMS[entry.transform].write, state[entry.name])
    return stored


def _weight(where: str, store: Store, key: str, header: Header) -> Lazy:
    def make() -> Tensor:
        tensor = store.tensor(key).to(torch.float32)
        if not is_finite(tensor):
            raise NonFiniteError(f"{where}: {key} holds NaN or infinity")
        return tensor

    return Lazy(make, torch.empty(header.shape, dtype=torch.float32, device="meta"))


def _statistic(store: Store, key: str, header: Header) -> Lazy:
    return Lazy(lambda: store.tensor(key), torch.empty(header.shape, dtype=header.dtype, device="meta"))


def _refuse_unknown(where: str, keymap: Sequence[Stored], found: set[str], prefix: str) -> None:
    known = {prefix + entry.key for entry in keymap}
    unknown = sorted(found - known)
    if unknown:
        expected = ", ".join(dict.fromkeys(prefix + entry.key for entry in keymap))
        listed = ", ".join(unknown[:8]) + (", …" if len(unknown) > 8 else "")
        raise FormatError(f"{where}: unknown tensor {listed}; expected {expected}")


def _choose(
    where: str, keymap: Sequence[Stored], headers: Mapping[str, Header], sizes: Mapping[str, int], prefix: str
) -> list[Stored]:
    """One entry for each name: the one whose tensor is there, and whose shape fits where one key has two."""
    chosen: list[Stored] = []
    for name in dict.fromkeys(entry.name for entry in keymap):
        options = [entry for entry in keymap if entry.name == name]
        present = [entry for entry in options if entry.key in headers]
        if len(present) > 1 and len({entry.key for entry in present}) == 1:
            present = _fitting(where, present, headers[present[0].key], sizes)
        if not present and all(entry.optional or entry.kind != "weight" for entry in options):
            continue
        if len(present) != 1:
            wanted = " or ".join(dict.fromkeys(prefix + entry.key for entry in options))
            fault = "is missing" if not present else "are both there, expected one"
            raise FormatError(f"{where}: {wanted} {fault}; found {', '.join(sorted(headers)) or 'nothing'}")
        chosen += present
    return chosen


def _fitting(where: str, options: list[Stored], header: Header, sizes: Mapping[str, int]) -> list[Stored]:
    """Of two layouts of one key, those that the shape allows; `FormatError` where that leaves both."""

    def fits(entry: Stored) -> bool:
        known = [sizes.get(dim) for dim in entry.dims]
        return len(known) == len(header.shape) and all(
            size is None or size == found for size, found in zip(known, header.shape, strict=True)
        )

    fitting = [entry for entry in options if fits(entry)]
    if len(fitting) > 1:
        layouts = " or ".join("[" + ", ".join(entry.dims) + "]" for entry in fitting)
        raise FormatError(f"{where}: {options[0].key} is {list(header.shape)}, which can be {layouts}")
    return fitting or options[:1]


def _check(where: str, entry: Stored, found: Header, sizes: dict[str, int], said: dict[str, str], prefix: str) -> None:
    key = prefix + entry.key
    if len(found.shape) == len(entry.dims):
        for dim, size in zip(entry.dims, found.shape, strict=True):
            if dim not in sizes:
                sizes[dim], said[dim] = size, key
    expected = [sizes.get(dim, 0) for dim in entry.dims]
    if list(found.shape) != expected:
        meaning = "; ".join(f"{dim}={sizes[dim]} from {said[dim]}" for dim in dict.fromkeys(entry.dims) if dim in sizes)
        wanted = expected if all(dim in sizes for dim in entry.dims) else list(entry.dims)
        raise FormatError(f"{where}: {key} is {list(found.shape)}, expected {wanted} ({meaning or 'a scalar'})")
    if entry.kind == "weight" and found.dtype not in FLOATS:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise FormatError(f"{where}: {key} is {str(found.dtype).removeprefix('torch.')}, expected one of {allowed}")
