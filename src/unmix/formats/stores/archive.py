"""zip archives, whose members are found but never unpacked to disk. Both torch and numpy save into them."""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.content import Content

MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_HEADER = 30
"""Bytes of a member's own header before its name."""
_SMALL = 64 << 20
_RATIO = 100
"""A member may unpack to `_SMALL` bytes, or to this many times its own: weights hardly compress."""

_BROKEN = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class Member:
    """One file of an archive: where its bytes lie in the archive."""

    info: zipfile.ZipInfo
    start: int
    size: int

    @property
    def stored(self) -> bool:
        """Whether its bytes are there as they are, not compressed."""
        return self.info.compress_type == zipfile.ZIP_STORED


class Archive:
    """The members of a zip file, each name and each claim checked."""

    def __init__(self, content: Content, shown: str) -> None:
        """`CorruptError` for a broken archive, `FormatError` for names that lead out of it."""
        self.content, self.shown = content, shown
        try:
            self._zip = zipfile.ZipFile(content.stream())
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
            raise CorruptError(f"{shown}: its zip directory cannot be read, it may be cut short ({error})") from error
        self.members: Mapping[str, Member] = self._members()

    def stream(self, name: str, most: int) -> io.BytesIO:
        """The first `most` bytes of a member, unpacked."""
        member = self.members[name]
        if member.stored:
            return io.BytesIO(self.content.cut(member.start, min(most, member.size)))
        try:
            with self._zip.open(member.info) as handle:
                return io.BytesIO(handle.read(most))
        except _BROKEN as error:
            raise CorruptError(f"{self.shown}: {name} cannot be unpacked ({error})") from error

    def unpack(self, name: str) -> bytearray:
        """The bytes of a compressed member. `FormatError` where they would be a flood, `CorruptError` on a bad CRC."""
        member = self.members[name]
        packed, size = member.info.compress_size, member.size
        if size > max(_SMALL, _RATIO * packed):
            raise FormatError(
                f"{self.shown}: {name} unpacks from {packed:,} to {size:,} bytes; "
                "weights do not compress like that: refused"
            )
        data = bytearray()
        try:
            with self._zip.open(member.info) as handle:
                while piece := handle.read(1 << 24):
                    data += piece
        except _BROKEN as error:
            raise CorruptError(f"{self.shown}: {name} cannot be unpacked ({error})") from error
        if len(data) != size:
            raise CorruptError(f"{self.shown}: {name} unpacks to {len(data):,} bytes, expected {size:,}")
        return data

    def _members(self) -> dict[str, Member]:
        members: dict[str, Member] = {}
        for info in self._zip.infolist():
            name = info.filename
            if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
                raise FormatError(
                    f"{self.shown}: the archive holds {name!r:.120}, a name that leads out of it: refused"
                )
            if name in members:
                raise CorruptError(f"{self.shown}: the archive holds {name!r:.120} twice")
            if info.flag_bits & 1:
                raise FormatError(f"{self.shown}: {name!r:.120} is encrypted")
            members[name] = self._place(info)
        return members

    def _place(self, info: zipfile.ZipInfo) -> Member:
        head = self.content.cut(info.header_offset, _HEADER)
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        start = info.header_offset + _HEADER + names
        if head[:4] != MAGIC[0] or start + info.compress_size > self.content.size:
            raise CorruptError(
                f"{self.shown}: {info.filename!r:.120} should have {info.compress_size:,} bytes at byte {start:,}, "
                f"the file has {self.content.size:,} in all"
            )
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise CorruptError(f"{self.shown}: {info.filename!r:.120} claims two different lengths")
        return Member(info, start, info.file_size)
