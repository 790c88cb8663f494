"""Declarative key maps: which stored tensor is which parameter, of what shape, through which transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmix.core.errors import FormatError, NonFiniteError
from unmix.formats.place import Header, Place
from unmix.formats.transforms import TRANSFORMS, State

_FLOATS = ("F64", "F32", "F16", "BF16")


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


def read_state(place: Place, file: str, keymap: Sequence[Stored], sizes: Mapping[str, int], source: str) -> State:
    """The coder's tensors, in float32.

    Everything is checked on the file's header before any data is read: `FormatError` for a missing or unknown
    tensor, a wrong shape (`sizes` are what `source` says) or dtype; `NonFiniteError` for NaN or infinity.
    """
    headers = place.headers(file)
    chosen = _choose(place, file, keymap, headers)
    for entry in chosen:
        _check(f"{place.shown}: {file}", entry, headers[entry.key], sizes, source)
    raw = place.tensors(file, [entry.key for entry in chosen])
    state: State = {}
    for entry in chosen:
        tensor = TRANSFORMS[entry.transform].read(raw[entry.key].to(torch.float32)).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{place.shown}: {file}: {entry.key} holds NaN or infinity")
        state[entry.name] = tensor
    return state


def write_state(state: State, keymap: Sequence[Stored]) -> dict[str, Tensor]:
    """The stored tensors of `state`: of alternatives, the first entry is written."""
    stored: dict[str, Tensor] = {}
    written: set[str] = set()
    for entry in keymap:
        if entry.name not in written:
            written.add(entry.name)
            stored[entry.key] = TRANSFORMS[entry.transform].write(state[entry.name]).contiguous()
    return stored


def _choose(place: Place, file: str, keymap: Sequence[Stored], headers: Mapping[str, Header]) -> list[Stored]:
    """The entries whose tensors are there: exactly one for each parameter, and nothing left over."""
    known = {entry.key for entry in keymap}
    unknown = sorted(set(headers) - known)
    expected = ", ".join(dict.fromkeys(entry.key for entry in keymap))
    if unknown:
        raise FormatError(f"{place.shown}: {file}: unknown tensor {', '.join(unknown)}; expected {expected}")
    chosen: list[Stored] = []
    for name in dict.fromkeys(entry.name for entry in keymap):
        options = [entry for entry in keymap if entry.name == name]
        present = [entry for entry in options if entry.key in headers]
        if len(present) != 1:
            wanted = " or ".join(entry.key for entry in options)
            fault = "is missing" if not present else "are both there, expected one"
            raise FormatError(f"{place.shown}: {file}: {wanted} {fault}; found {', '.join(sorted(headers))}")
        chosen += present
    return chosen


def _check(where: str, entry: Stored, found: Header, sizes: Mapping[str, int], source: str) -> None:
    expected = [sizes[dim] for dim in entry.dims]
    if list(found.shape) != expected:
        meaning = ", ".join(f"{dim}={sizes[dim]}" for dim in dict.fromkeys(entry.dims)) or "a scalar"
        raise FormatError(f"{where}: {entry.key} is {list(found.shape)}, expected {expected} ({meaning} from {source})")
    if found.dtype not in _FLOATS:
        raise FormatError(f"{where}: {entry.key} is {found.dtype}, expected one of {', '.join(_FLOATS)}")
