"""Which kind of file this is, by its first bytes. What is no file of tensors is told apart, so that errors help."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, cast

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores import archive, legacy, safetensors_file
from unmix.formats.stores.archive import Archive
from unmix.formats.stores.base import Store
from unmix.formats.stores.content import Content, open_content
from unmix.formats.stores.npz import NpzStore
from unmix.formats.stores.safetensors_file import SafetensorsStore
from unmix.formats.stores.sharded import ShardedStore
from unmix.formats.stores.torch_file import LegacyStore, PickleStore, ZipStore

KINDS = "safetensors, a safetensors index, torch's .pt (zip or old), .npz, a pickle, a gzipped pickle"
_GZIP = b"\x1f\x8b"
_SMALL = 64 << 20
_RATIO = 50
"""A gzip file may unpack to `_SMALL` bytes, or to this many times its own."""
_MAX_JSON = 100_000_000


def open_store(path: Path, shown: str | None = None) -> Store:
    """Open a file of tensors by its content; `shown` is how messages name it. Nothing in the file is run.

    `FormatError` where it is not one, or asks for something that is not allowed (the message says what);
    `CorruptError` where it is one but broken or cut short.
    """
    shown = shown or str(path)
    return _open(open_content(path, shown), path, shown)


def _open(content: Content, path: Path, shown: str, inside_gzip: bool = False) -> Store:
    head = content.cut(0, 512)
    if head.startswith(archive.MAGIC):
        return _open_archive(Archive(content, shown), shown)
    if head.startswith(_GZIP) and not inside_gzip:
        return _open(_gunzip(content, shown), path, f"{shown} (unpacked)", inside_gzip=True)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"{", b"[")) and safetensors_file.header_length(content) > safetensors_file.MAX_HEADER:
        return _open_json(content, path, shown, inside_gzip)
    if safetensors_file.claims_to_be(content):
        return SafetensorsStore(content, shown)
    if legacy.HEAD in head[:32]:
        return LegacyStore(content, shown)
    _refuse_text(text, shown)
    if (head[:1] == b"\x80" and head[1:2] <= b"\x05") or (
        head[:1] in b"(c]}" and content.cut(content.size - 1, 1) == b"."
    ):
        return PickleStore(content, shown)
    raise FormatError(f"{shown}: begins with {head[:12]!r}, which is none of {KINDS}")


def _open_archive(found: Archive, shown: str) -> Store:
    if any(name.endswith("data.pkl") for name in found.members):
        return ZipStore(found, shown)
    if any(name.endswith(".npy") for name in found.members):
        return NpzStore(found, shown)
    names = ", ".join(list(found.members)[:6]) or "nothing"
    raise FormatError(f"{shown}: a zip archive of neither torch nor numpy; it holds {names}")


def _open_json(content: Content, path: Path, shown: str, inside_gzip: bool) -> Store:
    if content.size > _MAX_JSON:
        raise FormatError(f"{shown}: is text of {content.size:,} bytes, not weights")
    try:
        tree = json.loads(content.cut(0, content.size).decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptError(f"{shown}: looks like JSON and is not ({str(error)[:120]})") from error
    if inside_gzip or not isinstance(tree, dict) or "weight_map" not in tree:
        raise FormatError(f"{shown}: is JSON without a weight_map: neither weights nor an index of them")
    return ShardedStore(cast("dict[str, Any]", tree), path, shown)


def _refuse_text(head: bytes, shown: str) -> None:
    """Two files that often stand where weights should be."""
    if head.startswith(b"version https://git-lfs"):
        raise FormatError(f"{shown}: this is a git-lfs pointer, not the weights; fetch them with: git lfs pull")
    if head[:16].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise FormatError(f"{shown}: this is a web page, not the weights: the download went wrong")


def _gunzip(content: Content, shown: str) -> Content:
    """The unpacked bytes, all of them in memory; the limit is checked while they come."""
    limit = max(_SMALL, _RATIO * content.size)
    data, at = bytearray(), 0
    unpacker = zlib.decompressobj(wbits=31)
    try:
        while at < content.size or unpacker.unconsumed_tail:
            if unpacker.eof:
                break
            piece = unpacker.unconsumed_tail or content.cut(at, 1 << 20)
            at += 0 if unpacker.unconsumed_tail else len(piece)
            data += unpacker.decompress(piece, 1 << 24)
            if len(data) > limit:
                raise FormatError(
                    f"{shown}: its {content.size:,} bytes unpack to more than {limit:,}; "
                    "weights do not compress like that: refused"
                )
    except zlib.error as error:
        raise CorruptError(f"{shown}: its gzip data are broken ({error})") from error
    if not unpacker.eof:
        raise CorruptError(f"{shown}: its gzip data are cut short")
    if not data:
        raise CorruptError(f"{shown}: unpacks to nothing")
    return Content(data)
