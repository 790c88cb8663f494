"""safetensors: an 8-byte length, a JSON header, and the data. Read here, so that every claim is checked before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.base import Header, Store, fits
from unmix.formats.stores.content import Content

MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    header: Header
    start: int
    end: int


class SafetensorsStore(Store):
    """A safetensors file. `values` are its metadata, which are texts."""

    def __init__(self, content: Content, shown: str) -> None:
        """`CorruptError` where the header is broken or the data are cut short, `FormatError` for an unknown dtype."""
        self.shown = shown
        self._content = content
        header, self._data = _header(content, shown)
        self._metadata = _metadata(header.pop("__metadata__", {}), shown)
        self._entries = {key: _entry(key, claim, shown) for key, claim in header.items()}
        _check_layout(self._entries, content.size - self._data, shown)

    def headers(self) -> Mapping[str, Header]:
        return {key: entry.header for key, entry in self._entries.items()}

    @property
    def values(self) -> Mapping[str, Any]:
        return self._metadata

    def read(self, key: str) -> Tensor:
        entry = self._entries[key]
        return self._content.tensor(self._data + entry.start, entry.header)


def claims_to_be(content: Content) -> bool:
    """Whether the bytes begin as a safetensors file does, however broken the rest may be."""
    return content.cut(8, 1) == b"{"


def header_length(content: Content) -> int:
    """The length that the first eight bytes claim."""
    return int.from_bytes(content.cut(0, 8), "little")


def _header(content: Content, shown: str) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the data begin."""
    length = header_length(content)
    if length > MAX_HEADER:
        raise CorruptError(f"{shown}: its header claims {length:,} bytes, allowed are {MAX_HEADER:,}")
    if 8 + length > content.size:
        raise CorruptError(
            f"{shown}: cut short: its header claims {length:,} bytes, the file has {content.size:,} in all"
        )
    try:
        header = json.loads(content.cut(8, length).decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptError(f"{shown}: its safetensors header is not sound JSON ({error})") from error
    if not isinstance(header, dict):
        raise CorruptError(f"{shown}: its safetensors header is a {type(header).__name__}, expected an object")
    return cast("dict[str, Any]", header), 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r} is there twice")
    return tree


def _metadata(tree: Any, shown: str) -> dict[str, str]:
    if not isinstance(tree, dict) or not all(isinstance(v, str) for v in tree.values()):
        raise CorruptError(f"{shown}: __metadata__ of its safetensors header must map texts to texts")
    return cast("dict[str, str]", tree)


def _entry(key: str, claim: Any, shown: str) -> _Entry:
    where = f"{shown}: {key}"
    claim = cast("dict[str, Any]", claim) if isinstance(claim, dict) else {}
    if set(claim) != {"dtype", "shape", "data_offsets"}:
        raise CorruptError(f"{where}: its header entry must hold dtype, shape and data_offsets")
    shape, offsets = claim["shape"], claim["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CorruptError(f"{where}: shape {shape!r:.80} and data_offsets {offsets!r:.80} must be whole numbers ≥ 0")
    dtype = DTYPES.get(claim["dtype"]) if isinstance(claim["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{where}: dtype {claim['dtype']!r:.40} is not supported; allowed: {', '.join(DTYPES)}")
    header = Header(tuple(shape), dtype)
    start, end = offsets
    if end - start != header.nbytes:
        raise CorruptError(
            f"{where}: {claim['dtype']} {list(shape)} takes {header.nbytes:,} bytes, "
            f"its data_offsets span {end - start:,}"
        )
    return _Entry(header, start, end)


def _sizes(found: Any) -> bool:
    return isinstance(found, list) and fits(cast("list[Any]", found))


def _check_layout(entries: Mapping[str, _Entry], available: int, shown: str) -> None:
    """No tensor shares bytes with another, and all lie inside the file."""
    expected = max((entry.end for entry in entries.values()), default=0)
    if expected > available:
        raise CorruptError(
            f"{shown}: cut short: its tensors take {expected:,} bytes of data, the file has {max(available, 0):,}"
        )
    before, last = 0, ""
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < before:
            raise CorruptError(f"{shown}: the data of {last} and {key} overlap")
        if entry.end > entry.start:
            before, last = entry.end, key
