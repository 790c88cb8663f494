"""Writing what `torch.load` reads, tensor by tensor: its zip layout, put together here.

`torch.save` needs every tensor in memory at once. The layout is small: a pickle that describes the tree, and one
aligned member a tensor. The bytes depend on the tree alone, not on the time or the machine.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, _utils

from unmix.core.atomic import atomic_file
from unmix.core.errors import FormatError
from unmix.core.progress import Task
from unmix.formats.lazy import Lazy
from unmix.formats.stores.base import Header, count
from unmix.formats.stores.writing import write_data

_ALIGNMENT = 64
_ROOT = "archive"
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20
_ZIP64_FROM = 2_000_000_000
"""Bytes; below where the format needs its 64-bit fields."""
_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip


def write_torch(path: Path, tree: Any, progress: Task | None = None) -> None:
    """Write `tree` (mappings, lists and plain values, with `Lazy` or tensors in them) for `torch.load`, atomically.

    `progress` advances by bytes. `FormatError` for a value that `weights_only=True` would refuse; `NonFiniteError`
    where a tensor holds NaN or infinity.
    """
    described = io.BytesIO()
    pickler = _TreePickler(described, str(path))
    pickler.dump(tree)
    with atomic_file(path) as temp, temp.open("wb") as handle, zipfile.ZipFile(handle, "w") as archive:
        for name, data in (("data.pkl", described.getvalue()), ("byteorder", b"little")):
            with _member(archive, name, len(data)) as member:
                member.write(data)
        for key, lazy in enumerate(pickler.found):
            with _member(archive, f"data/{key}", Header(lazy.shape, lazy.dtype).nbytes) as member:
                write_data(member, lazy, str(path), progress)
        with _member(archive, "version", 2) as member:
            member.write(b"3\n")


class _StorageOf:
    """Stands for the data of one tensor while the tree is pickled."""

    def __init__(self, key: int, lazy: Lazy) -> None:
        self.key, self.lazy = key, lazy


class _TreePickler(pickle.Pickler):
    """Describes tensors as torch does, and remembers them in the order of their keys."""

    def __init__(self, handle: io.BytesIO, shown: str) -> None:
        super().__init__(handle, protocol=2)
        self.found: list[Lazy] = []
        self._shown = shown

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StorageOf):
            return None
        return ("storage", _STORAGES[obj.lazy.dtype], str(obj.key), "cpu", count(obj.lazy.shape))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, OrderedDict) or any(obj is known for known in (_REBUILD, OrderedDict, *_STORAGES.values())):
            return NotImplemented
        lazy = Lazy.of(obj) if isinstance(obj, Tensor) else obj
        if not isinstance(lazy, Lazy):
            raise FormatError(f"{self._shown}: a {type(obj).__name__} cannot be written, allowed are plain values")
        if lazy.dtype not in _STORAGES:
            raise FormatError(f"{self._shown}: torch's files have no storage of dtype {lazy.dtype}")
        self.found.append(lazy)
        strides = [count(lazy.shape[i + 1 :]) for i in range(len(lazy.shape))]
        storage = _StorageOf(len(self.found) - 1, lazy)
        return _REBUILD, (storage, 0, lazy.shape, tuple(strides), False, OrderedDict())


_REBUILD = _utils._rebuild_tensor_v2  # pyright: ignore[reportPrivateUsage]
"""What torch names in its files for a tensor; it is only named here, never called."""


def _member(archive: zipfile.ZipFile, name: str, size: int) -> io.BufferedIOBase:
    """Open a member for writing whose data begin at an aligned byte of the file, so that they can be mapped."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    info.file_size = size
    large = size >= _ZIP64_FROM
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + (_ZIP64_EXTRA if large else 0) + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    return cast("io.BufferedIOBase", archive.open(info, "w", force_zip64=large))
