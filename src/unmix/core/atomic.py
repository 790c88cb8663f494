"""Files that are either whole or absent: temp file → fsync → rename → fsync the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unmix.core.errors import MachineError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn a full, read-only or forbidden disk into one `MachineError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = _DISK_ERRORS.get(error.errno or 0)
        if reason is None:
            raise
        raise MachineError(f"cannot write {path}: {reason}") from error


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable. A no-op where the system cannot open folders."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def atomic_file(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(fd)
        temp = Path(name)
        try:
            yield temp
            with temp.open("rb+") as handle:
                os.fsync(handle.fileno())
            temp.chmod(0o644)
            temp.replace(path)
            fsync_folder(path.parent)
        finally:
            temp.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Generator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path` whole."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temp
            for file in temp.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as handle:
                        os.fsync(handle.fileno())
            temp.chmod(0o755)
            fsync_folder(temp)
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                path.rename(old)
                temp.rename(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                temp.rename(path)
            fsync_folder(path.parent)
        finally:
            if temp.exists():
                shutil.rmtree(temp, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as temp:
        temp.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
