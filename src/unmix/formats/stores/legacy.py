"""torch files from before 1.6: five pickles in a row, then the storages, each behind its number of elements."""

from __future__ import annotations

from typing import Any, cast

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.content import Content
from unmix.formats.stores.globals import Args, BagClass, RefusedError, StorageRef, StorageType
from unmix.formats.stores.pickles import unpickle

_MAGIC = 0x1950A86A20F9469CFC6C
HEAD = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")
"""The opcode of the magic number, right behind what names the protocol (2 bytes, from protocol 4 on 11)."""
_PROTOCOL = 1001
_LARGEST = 1 << 60

Span = tuple[Content, int, int]
"""Where a storage lies: in what, from which byte, how many bytes."""


def resolve(key: Any) -> Any:
    """What a persistent id of torch names: a storage, or (in old files) a class that was saved with its source."""
    if isinstance(key, tuple):
        parts = cast("Args", key)
        if len(parts) in (5, 6) and parts[0] == "storage":
            return _storage(*parts[1:])
        if len(parts) == 4 and parts[0] == "module" and isinstance(parts[1], BagClass):
            return parts[1]
    raise RefusedError("it refers to something outside that is not a storage")


def _storage(kind: Any, key: Any, device: Any, elements: Any, view: Any = None) -> StorageRef:
    offset = 0
    if isinstance(view, tuple) and len(cast("Args", view)) == 3:
        _, offset, elements = cast("Args", view)
    elif view is not None:
        raise RefusedError("it refers to an unknown view of a storage")
    if not isinstance(kind, StorageType) or not isinstance(key, str):
        raise RefusedError("it refers to a storage without type or name")
    if not all(type(n) is int and 0 <= n < _LARGEST for n in (elements, offset)):
        raise RefusedError("it refers to a storage whose size is not a sound number")
    itemsize = 1 if kind.dtype is None else kind.dtype.itemsize
    return StorageRef(key, kind.dtype, elements * itemsize, offset * itemsize)


def read_legacy(content: Content, shown: str) -> tuple[Any, dict[str, Span]]:
    """The tree of an old torch file, and where each of its storages lies."""
    stream = content.stream()
    magic, protocol, system = (unpickle(stream, shown) for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
        raise CorruptError(f"{shown}: its head is not that of a torch file")
    if not cast("dict[Any, Any]", system).get("little_endian", True):
        raise FormatError(f"{shown}: was written on a big-endian machine, which is not supported")
    itemsizes: dict[str, int] = {}

    def seen(key: Any) -> Any:
        found = resolve(key)
        if isinstance(found, StorageRef):
            itemsizes.setdefault(found.key, 1 if found.dtype is None else found.dtype.itemsize)
        return found

    tree, keys = unpickle(stream, shown, seen), unpickle(stream, shown)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in cast("list[Any]", keys)):
        raise CorruptError(f"{shown}: the list of its storages is broken")
    return tree, _spans(content, stream.tell(), cast("list[str]", keys), itemsizes, shown)


def _spans(content: Content, at: int, keys: list[str], itemsizes: dict[str, int], shown: str) -> dict[str, Span]:
    spans: dict[str, Span] = {}
    for key in keys:
        length = int.from_bytes(content.cut(at, 8), "little") * itemsizes.get(key, 1)
        if at + 8 + length > content.size:
            raise CorruptError(
                f"{shown}: cut short: storage {key[:40]} takes {length:,} bytes from byte {at + 8:,}, "
                f"the file has {content.size:,} in all"
            )
        spans[key] = (content, at + 8, length)
        at += 8 + length
    return spans
