"""One process at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from unmix.core.atomic import disk_errors
from unmix.core.errors import ResumeError


@contextmanager
def folder_lock(folder: str | Path) -> Generator[None]:
    """Hold `folder/.lock` while inside. The system drops it when the process dies, however it dies.

    Raises `ResumeError` at once where another process holds it, naming its process id.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise ResumeError(f"{folder}: another process (pid {owner}) is working in this run") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
