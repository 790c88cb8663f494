"""numpy's archives of arrays: one `.npy` a member, read lazily. Objects (which are pickles) are refused."""

from __future__ import annotations

import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.archive import Archive
from unmix.formats.stores.base import Header, Store, count, fits
from unmix.formats.stores.content import Content

_NUMBERS = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64 complex64 complex128"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NUMBERS.split()}
_HEAD = 65_536
"""Bytes of a member that are looked at for its header."""


@dataclass(frozen=True)
class _Array:
    member: str
    skip: int
    dtype: np.dtype[Any]
    fortran: bool
    shape: tuple[int, ...]


class NpzStore(Store):
    """Arrays of numbers are tensors; arrays of texts are `values`."""

    def __init__(self, archive: Archive, shown: str) -> None:
        """Read each member's header: `FormatError` for objects, `CorruptError` for claims that contradict."""
        self.shown = shown
        self._archive = archive
        self._arrays: dict[str, _Array] = {}
        self._headers: dict[str, Header] = {}
        self._texts: dict[str, Any] = {}
        for name in archive.members:
            key = name.removesuffix(".npy")
            array = self._array(name)
            if array.dtype.kind in "US":
                content, start = self._bytes(array)
                raw = np.frombuffer(content.cut(start, array.dtype.itemsize * count(array.shape)), array.dtype)
                self._texts[key] = raw.reshape(array.shape).tolist()
            else:
                self._arrays[key] = array
                self._headers[key] = Header(array.shape, DTYPES[array.dtype.name])

    def headers(self) -> Mapping[str, Header]:
        return self._headers

    @property
    def values(self) -> Mapping[str, Any]:
        return self._texts

    def read(self, key: str) -> Tensor:
        array, header = self._arrays[key], self._headers[key]
        content, start = self._bytes(array)
        shape = array.shape[::-1] if array.fortran else array.shape
        if array.dtype.isnative:
            tensor = content.tensor(start, Header(shape, header.dtype))
        else:
            raw = np.frombuffer(content.cut(start, header.nbytes), array.dtype)
            tensor = torch.from_numpy(raw.astype(array.dtype.newbyteorder("="))).reshape(shape)
        return tensor.permute(*range(tensor.dim())[::-1]) if array.fortran else tensor

    def _bytes(self, array: _Array) -> tuple[Content, int]:
        """What holds the array's data, and from which byte."""
        member = self._archive.members[array.member]
        if member.stored:
            return self._archive.content, member.start + array.skip
        return Content(self._archive.unpack(array.member)), array.skip

    def _array(self, name: str) -> _Array:
        """The header of one member, checked against the length that the archive claims for it."""
        where = f"{self.shown}: {name}"
        stream = self._archive.stream(name, _HEAD)
        try:
            version = np.lib.format.read_magic(stream)
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in readers:
                raise FormatError(f"{where}: .npy version {version}, supported are 1.0 and 2.0")
            shape, fortran, dtype = readers[version](stream)
        except (ValueError, SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
            raise CorruptError(f"{where}: not a sound .npy ({str(error)[:160]})") from error
        if dtype.hasobject:
            raise FormatError(f"{where}: holds Python objects, which only a pickle could give back: refused")
        if dtype.name not in DTYPES and (dtype.kind not in "US" or not dtype.itemsize):
            raise FormatError(f"{where}: dtype {dtype} is not supported; allowed: {', '.join(DTYPES)}")
        array = _Array(name, stream.tell(), dtype, fortran, tuple(shape))
        self._check(where, array)
        return array

    def _check(self, where: str, array: _Array) -> None:
        if not fits(array.shape):
            raise CorruptError(f"{where}: shape {array.shape!r:.80} is not sound")
        expected = array.dtype.itemsize * count(array.shape)
        found = self._archive.members[array.member].size - array.skip
        if expected != found:
            raise CorruptError(
                f"{where}: {array.dtype} {list(array.shape)} takes {expected:,} bytes, the archive says {found:,}"
            )
