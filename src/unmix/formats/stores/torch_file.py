"""What `torch.save` writes: a pickle that describes, and storages beside it, in a zip archive or in a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.archive import Archive
from unmix.formats.stores.base import Header, Store, count
from unmix.formats.stores.content import Content
from unmix.formats.stores.flatten import flatten
from unmix.formats.stores.globals import Maker, RefusedError, StorageRef, TensorRef
from unmix.formats.stores.legacy import Span, read_legacy, resolve
from unmix.formats.stores.pickles import unpickle

_MAX_PICKLE = 1 << 28


class PickledStore(Store):
    """Tensors described by a pickle; a subclass knows where their bytes are."""

    def __init__(self, tree: Any, shown: str) -> None:
        self.shown = shown
        self._refs, self._values = flatten(tree, shown)
        self._headers = {key: Header(ref.shape, ref.dtype) for key, ref in self._refs.items()}
        for key, ref in self._refs.items():
            _check(f"{shown}: {key}", ref)

    def headers(self) -> Mapping[str, Header]:
        return self._headers

    @property
    def values(self) -> Mapping[str, Any]:
        return self._values

    @abstractmethod
    def place(self, storage: StorageRef) -> Span:
        """Where a storage's bytes are: in what, from which byte, how many. `CorruptError` where they are not."""

    def read(self, key: str) -> Tensor:
        ref = self._refs[key]
        content, start, length = self.place(ref.storage)
        start, needed = start + ref.storage.offset, ref.storage.nbytes
        if ref.storage.offset + needed > length:
            raise CorruptError(
                f"{self.shown}: {key}: its storage has {length:,} bytes, expected {ref.storage.offset + needed:,}"
            )
        if _contiguous(ref):
            return content.tensor(start + ref.offset * ref.dtype.itemsize, self._headers[key])
        whole = content.tensor(start, Header((needed // ref.dtype.itemsize,), ref.dtype))
        return whole.as_strided(ref.shape, ref.stride, whole.storage_offset() + ref.offset)


class ZipStore(PickledStore):
    """`torch.save` since 1.6: `NAME/data.pkl` and `NAME/data/KEY` in an archive, not compressed."""

    def __init__(self, archive: Archive, shown: str) -> None:
        self._archive = archive
        pickles = [n for n in archive.members if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise FormatError(f"{shown}: the archive holds {len(pickles)} files named data.pkl, expected one")
        self._root = pickles[0].removesuffix("data.pkl")
        for name, member in archive.members.items():
            if not member.stored:
                raise FormatError(f"{shown}: {name} is compressed; torch never does that: refused")
        order = self._small("byteorder") or b"little"
        if order != b"little":
            raise FormatError(f"{shown}: byte order {order!r:.20}, expected b'little'")
        pickle = archive.members[pickles[0]]
        if pickle.size > _MAX_PICKLE:
            raise FormatError(f"{shown}: data.pkl has {pickle.size:,} bytes, allowed are {_MAX_PICKLE:,}")
        stream = archive.content.stream(pickle.start, pickle.size)
        super().__init__(unpickle(stream, shown, resolve), shown)

    def _small(self, name: str) -> bytes | None:
        member = self._archive.members.get(self._root + name)
        return None if member is None else self._archive.content.cut(member.start, min(member.size, 64)).strip()

    def place(self, storage: StorageRef) -> Span:
        member = self._archive.members.get(f"{self._root}data/{storage.key}")
        if member is None:
            raise CorruptError(f"{self.shown}: the archive lacks data/{storage.key[:80]}")
        return self._archive.content, member.start, member.size


class LegacyStore(PickledStore):
    """`torch.save` before 1.6: five pickles in a row, then the storages."""

    def __init__(self, content: Content, shown: str) -> None:
        self._content = content
        tree, self._spans = read_legacy(content, shown)
        super().__init__(tree, shown)

    def place(self, storage: StorageRef) -> Span:
        if storage.key not in self._spans:
            raise CorruptError(f"{self.shown}: the storage {storage.key[:80]} is missing")
        return self._spans[storage.key]


class PickleStore(PickledStore):
    """A plain pickle. Its storages are old torch files of their own, as bytes inside it."""

    def __init__(self, content: Content, shown: str) -> None:
        self._spans: dict[str, Span] = {}
        makers = {"torch.storage._load_from_bytes": Maker("torch.storage._load_from_bytes", self._embedded)}
        stream = content.stream()
        tree = unpickle(stream, shown, makers=makers)
        if stream.tell() != content.size:
            raise CorruptError(f"{shown}: {content.size - stream.tell():,} bytes follow the end of its pickle")
        super().__init__(tree, shown)

    def _embedded(self, data: Any) -> StorageRef:
        if not isinstance(data, bytes):
            raise RefusedError("a storage is read from something else than bytes")
        tree, spans = read_legacy(Content(bytearray(data)), "a storage inside it")
        if not isinstance(tree, StorageRef) or tree.key not in spans:
            raise RefusedError("bytes that should be a storage are something else")
        key = f"{len(self._spans)}"
        self._spans[key] = spans[tree.key]
        return replace(tree, key=key)

    def place(self, storage: StorageRef) -> Span:
        return self._spans[storage.key]


def _check(where: str, ref: TensorRef) -> None:
    """A tensor stays inside its storage, and is not larger than it (a stride of 0 could claim anything)."""
    itemsize = ref.dtype.itemsize
    available = ref.storage.nbytes // itemsize
    last = ref.offset + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.stride, strict=True))
    if 0 not in ref.shape and (last >= available or count(ref.shape) > available):
        raise CorruptError(
            f"{where}: shape {list(ref.shape)}, stride {list(ref.stride)} and offset {ref.offset} do not fit "
            f"its storage of {available:,} elements"
        )


def _contiguous(ref: TensorRef) -> bool:
    expected = 1
    for size, stride in zip(reversed(ref.shape), reversed(ref.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
