"""Lines of UTF-8 files, plain or gzipped, with errors that say which file and line."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

from unmix.core.errors import DataError

_PROBE = 1 << 16


def data_suffix(path: str | Path) -> str:
    """The suffix that names the kind, lower-case, without `.gz`: `a/b.JSONL.gz` → `.jsonl`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn what can go wrong while reading `path` into one `DataError`."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Raise `DataError` where `path` is missing, not a file, empty or unreadable."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    with reading(path), path.open("rb") as handle:
        if not handle.read(1):
            raise DataError(f"{path}: the file is empty")


def check_text(path: Path) -> None:
    """Raise `DataError` where `check_file` does, or where the first 64 KiB are not UTF-8 text."""
    check_file(path)
    with reading(path), _open(path) as handle:
        head = handle.read(_PROBE)
    if not head.strip():
        raise DataError(f"{path}: the file holds no text")
    if (at := head.find(b"\0")) >= 0:
        raise DataError(f"{path}: a binary file (NUL at byte {at}), expected UTF-8 text")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _PROBE)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte 0x{head[error.start]:02x} at {error.start})") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """`(line number from 1, line with its end)`; a byte-order mark is dropped. `DataError` names file and line."""
    with reading(path), _open(path) as handle:
        for number, raw in enumerate(handle, 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if b"\0" in raw:
                raise DataError(f"{path}:{number}: a NUL byte, expected UTF-8 text")
            try:
                yield number, raw.decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 text (byte 0x{raw[error.start]:02x} at {error.start} of the line)"
                ) from error


def _open(path: Path) -> BufferedIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(path, "rb")
    return path.open("rb")
