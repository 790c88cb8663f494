"""One process at a time in a run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unmix.core.errors import MachineError, ResumeError
from unmix.core.lock import folder_lock

_HOLD = """
import sys, time
from unmix.core.lock import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """It is told who holds the folder, and SIGKILL leaves no stale lock."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        message = rf"^{tmp_path}: another process \(pid {holder.pid}\) is working in this run$"
        with pytest.raises(ResumeError, match=message), folder_lock(tmp_path):
            raise AssertionError("never entered")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text(encoding="utf-8") == str(os.getpid())


def test_the_lock_is_given_back(tmp_path: Path) -> None:
    """After a clean end and after an exception; not while it is held."""
    with folder_lock(tmp_path / "new"), pytest.raises(ResumeError), folder_lock(tmp_path / "new"):
        raise AssertionError("never entered")
    with pytest.raises(KeyError), folder_lock(tmp_path / "new"):
        raise KeyError
    with folder_lock(tmp_path / "new"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only disk."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(MachineError, match=r"^cannot write .*: the file system is read-only$"),
        folder_lock(tmp_path / "x"),
    ):
        raise AssertionError("never entered")
