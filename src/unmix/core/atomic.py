"""Files that are either whole or absent: temp file → fsync → rename → fsync the folder."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unmix.core.errors import ConfigError, MachineError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


def disk_fault(error: OSError) -> str | None:
    """In words, what the disk refused; None for errors that are not the disk's."""
    return _DISK_ERRORS.get(error.errno or 0)


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn a full, read-only or forbidden disk into one `MachineError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = disk_fault(error)
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
    """Yield a temporary folder beside `path`; on success it takes the place of `path` whole.

    Whatever `path` held before is gone then: callers check first that it is theirs. `ConfigError` where it is a file.
    """
    path = Path(path)
    with disk_errors(path):
        if path.is_file():
            raise ConfigError(f"{path}: is a file, expected a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temp
            for entry in temp.rglob("*"):
                if entry.is_dir():
                    fsync_folder(entry)
                elif entry.is_file():
                    with entry.open("rb+") as handle:
                        os.fsync(handle.fileno())
            temp.chmod(0o755)
            fsync_folder(temp)
            _take_place(temp, path)
            fsync_folder(path.parent)
        finally:
            if temp.exists():
                shutil.rmtree(temp, ignore_errors=True)


def _take_place(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`, and remove what was there."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that neither is ever absent; False where the system cannot (it needs Linux)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return swap is not None and swap(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def sweep(path: str | Path) -> None:
    """Clear what killed writers of the file or folder `path` left beside it; put back the older one of a broken swap.

    Only for the one process that may write `path`: another one's half-written files would go too.
    """
    path = Path(path)
    name = glob.escape(path.name)
    for old in sorted(path.parent.glob(f".{name}.*.old")):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for temp in path.parent.glob(f".{name}.*.tmp"):
        if temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        else:
            temp.unlink(missing_ok=True)


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
