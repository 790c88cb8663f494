"""The bytes of one file: mapped, or held in memory where they had to be decompressed."""

from __future__ import annotations

import io
import mmap
import os
import stat
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.base import Header

_NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which `mmap` does not name: without it, no file larger than the memory can be mapped."""


class Content:
    """Bytes with a length, from which tensors are cut without copying."""

    def __init__(self, data: mmap.mmap | bytearray) -> None:
        self.data = data
        self.size = len(data)

    def cut(self, start: int, length: int) -> bytes:
        """A copy of at most `length` bytes from `start`."""
        return bytes(self.data[start : start + length])

    def stream(self, start: int = 0, length: int | None = None) -> io.BufferedReader:
        """A readable, seekable view of a part of the bytes."""
        end = self.size if length is None else start + length
        return io.BufferedReader(_Window(self.data, start, end))

    def tensor(self, start: int, header: Header) -> Tensor:
        """The contiguous tensor whose data begin at byte `start`; a copy only where they are not aligned."""
        nbytes = header.nbytes
        if nbytes == 0:
            return torch.empty(header.shape, dtype=header.dtype)
        # Each tensor gets a storage of its own length, so that saving one of them never saves the whole file.
        if start % header.dtype.itemsize == 0:
            number = nbytes // header.dtype.itemsize
            flat = torch.frombuffer(self.data, dtype=header.dtype, count=number, offset=start)
        else:
            flat = torch.frombuffer(self.data, dtype=torch.uint8, count=nbytes, offset=start).clone().view(header.dtype)
        return flat.reshape(header.shape)


class _Window(io.RawIOBase):
    """A range of bytes as a file; a mapping has one position of its own, which readers would share."""

    def __init__(self, data: mmap.mmap | bytearray, start: int, end: int) -> None:
        self._data, self._start, self._end, self._at = data, start, end, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        piece = self._data[self._at : min(self._at + len(buffer), self._end)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        self._at = min(max(base + offset, self._start), self._end)
        return self._at - self._start


def open_content(path: Path, shown: str) -> Content:
    """Map a regular file. `FormatError` where it is absent or something else, `CorruptError` where it is empty."""
    try:
        # A pipe would block here for ever without the flag; it is refused just below.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise FormatError(f"{shown}: cannot be opened ({error.strerror})") from error
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a device, pipe or socket"
            raise FormatError(f"{shown}: is {kind}, expected a file of tensors")
        if facts.st_size == 0:
            raise CorruptError(f"{shown}: is empty (0 bytes)")
        return Content(_map(fd))
    finally:
        os.close(fd)


def _map(fd: int) -> mmap.mmap:
    """A private mapping: writing to a tensor in place never reaches the file, nor crashes as on a read-only one."""
    if sys.platform != "linux":
        return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
