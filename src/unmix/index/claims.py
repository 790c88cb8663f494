"""Locks of a build: one builder at a place (or several parts of one), and one process for each shard or group.

All are `flock`s, which the system drops when a process dies, however it dies; on a shared file system they hold
between machines where that file system says so (NFS does).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from unmix.core.atomic import disk_errors
from unmix.core.errors import ResumeError

PATIENCE = 10.0
"""Seconds that a part waits for another one to begin or end the build."""


@contextmanager
def claim(path: Path) -> Generator[bool]:
    """Whether this process alone works at `path` (a file made for it) while inside; never waits."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    with handle:
        yield _locked(handle, fcntl.LOCK_EX)


class BuildLock:
    """The lock of a building folder: held alone, or shared among the parts of one build."""

    def __init__(self, building: Path) -> None:
        self._building = building
        self._handle: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def alone(self) -> bool:
        """Take the lock alone; False where another process holds it."""
        return self._take(fcntl.LOCK_EX)

    def shared(self) -> bool:
        """Take the lock beside other parts."""
        return self._take(fcntl.LOCK_SH)

    def share(self) -> None:
        """Give the sole hold up for a shared one. Another part may be alone for a moment in between."""
        end = time.monotonic() + PATIENCE
        while not self.shared():
            if time.monotonic() > end:
                raise self.refusal()
            time.sleep(0.05)

    def alone_or_shared(self) -> bool:
        """Alone where nobody else works here (True), else shared (False). `ResumeError` where it cannot be had."""
        end = time.monotonic() + PATIENCE
        while True:
            if self.alone():
                return True
            if self.shared():
                return False
            if time.monotonic() > end:
                raise self.refusal()
            time.sleep(0.05)

    def refusal(self) -> ResumeError:
        """The error for a place where another process builds."""
        path = self._building / ".lock"
        owner = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        return ResumeError(f"{self._building}: another process (pid {owner or 'unknown'}) is building this index")

    def _take(self, kind: int) -> bool:
        path = self._building / ".lock"
        while True:
            if self._handle is None:
                with disk_errors(self._building):
                    self._building.mkdir(parents=True, exist_ok=True)
                    self._handle = path.open("a+")
            if not _locked(self._handle, kind):
                self.release()
                return False
            # The folder may have been removed, by the builder that ended, between opening and locking.
            if path.exists() and os.fstat(self._handle.fileno()).st_ino == path.stat().st_ino:
                break
            self.release()
        if kind == fcntl.LOCK_EX:
            self._handle.truncate(0)
            self._handle.write(str(os.getpid()))
            self._handle.flush()
        return True


def _locked(handle: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
