"""Writing safetensors tensor by tensor: a coder of any size in the memory of its largest tensor."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from unmix.core.atomic import atomic_file, write_json
from unmix.core.errors import FormatError, NonFiniteError
from unmix.core.progress import Task
from unmix.formats.lazy import Lazy
from unmix.formats.stores.base import Header
from unmix.formats.stores.finite import is_finite
from unmix.formats.stores.safetensors_file import DTYPES

_LEAST, _MOST = 1 << 20, 64 << 20
"""Bytes that are made contiguous and written at a time: a sixteenth of the tensor, within these bounds."""
PROGRESS: ContextVar[Task | None] = ContextVar("unmix_writing", default=None)
"""Where bytes are counted when the writer was given nothing else: a conversion sets it around a format's `write`."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None, progress: Task | None = None
) -> None:
    """Write one safetensors file, whole or not at all; each tensor is made, written in chunks and let go.

    `progress` advances by bytes. `NonFiniteError` where a tensor holds NaN or infinity; `FormatError` for a dtype
    that safetensors does not know.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    # Large items first keep every tensor aligned in the file, so that it can be mapped as it is.
    entries, end = dict[str, object](), 0
    for name in ordered:
        header = Header(tensors[name].shape, tensors[name].dtype)
        if header.dtype not in _NAMES:
            raise FormatError(f"{path}: {name}: safetensors has no dtype {header.dtype}")
        span = [end, end + header.nbytes]
        entries[name] = {"dtype": _NAMES[header.dtype], "shape": list(header.shape), "data_offsets": span}
        end = span[1]
    head = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps({**head, **entries}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temp, temp.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            write_data(handle, tensors[name], f"{path}: {name}", progress)


def write_sharded(
    folder: Path, stem: str, tensors: Mapping[str, Lazy], shard_bytes: int, progress: Task | None = None
) -> tuple[str, ...]:
    """Write `STEM-00001-of-0000N.safetensors` and `STEM.safetensors.index.json`; one file where one will do.

    A shard holds at most `shard_bytes` of tensors, or one larger tensor. Gives the names of the files, the index last.
    """
    shards: list[dict[str, Lazy]] = []
    sizes = {name: Header(lazy.shape, lazy.dtype).nbytes for name, lazy in tensors.items()}
    room = 0
    for name, lazy in tensors.items():
        if not shards or sizes[name] > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = lazy
        room -= sizes[name]
    if len(shards) <= 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"}, progress)
        return (f"{stem}.safetensors",)
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "pt"}, progress)
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = f"{stem}.safetensors.index.json"
    write_json(folder / index, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    return (*names, index)


def write_data(handle: io.BufferedIOBase, lazy: Lazy, shown: str, progress: Task | None = None) -> None:
    """Append the bytes of one tensor, row by row as it would lie in memory. `NonFiniteError` for NaN or infinity."""
    shown_by = progress or PROGRESS.get()
    tensor = lazy().detach()
    if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
        raise FormatError(f"{shown}: is {tensor.dtype} {list(tensor.shape)}, expected {lazy.dtype} {list(lazy.shape)}")
    for chunk in _chunks(tensor):
        if not is_finite(chunk):
            raise NonFiniteError(f"{shown} holds NaN or infinity; nothing was written")
        handle.write(chunk.view(torch.uint8).numpy().data)
        if shown_by is not None:
            shown_by.advance(chunk.nbytes)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Flat contiguous pieces of `tensor`, in order; only they are copied, and each is gone when the next comes."""
    if tensor.numel() == 0:
        return
    size = min(max(tensor.nbytes // 16, _LEAST), _MOST)
    if tensor.is_contiguous() or tensor.nbytes <= size:
        flat = tensor.reshape(-1).contiguous()
        # A tensor of one element is contiguous whatever its stride, and keeps an odd one.
        yield from flat.as_strided(flat.shape, (1,)).split(size // tensor.itemsize)
        return
    rows = size * tensor.shape[0] // tensor.nbytes
    if rows == 0:
        for row in tensor:
            yield from _chunks(row)
        return
    # One buffer for all of them: allocating anew for each leaves several in the allocator's hands.
    buffer = torch.empty(rows * tensor[0].numel(), dtype=tensor.dtype)
    for part in tensor.split(rows):
        flat = buffer[: part.numel()]
        flat.view(part.shape).copy_(part)
        yield flat
