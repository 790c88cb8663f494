"""Locks of a build: who holds what, and that nobody is left out for ever."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from unmix.core.errors import ResumeError
from unmix.index.claims import BuildLock, claim


def test_one_claims_a_shard(tmp_path: Path) -> None:
    with claim(tmp_path / "claims" / "3") as first, claim(tmp_path / "claims" / "3") as second:
        assert first and not second
        with claim(tmp_path / "claims" / "4") as other:
            assert other
    with claim(tmp_path / "claims" / "3") as again:
        assert again


def _die(path: Path) -> None:
    with claim(path) as mine:
        assert mine
        os.kill(os.getpid(), 9)


def test_a_claim_dies_with_its_holder(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(tmp_path / "3",))
    process.start()
    process.join()
    assert process.exitcode == -9
    with claim(tmp_path / "3") as mine:
        assert mine


def test_alone_or_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmix.index.claims.PATIENCE", 0.05)
    with BuildLock(tmp_path / "b") as one, BuildLock(tmp_path / "b") as other:
        assert one.alone() and not other.alone() and not other.shared()
        with pytest.raises(ResumeError, match=rf"b: another process \(pid {os.getpid()}\) is building this index"):
            other.alone_or_shared()
        one.share()
        assert other.alone_or_shared() is False and not one.alone()
        one.release()
        other.release()
        assert one.alone_or_shared() is True


def test_a_folder_removed_by_its_holder_is_locked_anew(tmp_path: Path) -> None:
    """Who opened the lock's file before that must not hold a lock that nobody else sees."""
    with BuildLock(tmp_path / "b") as one:
        assert one.alone()
        shutil.rmtree(tmp_path / "b")
        with BuildLock(tmp_path / "b") as other:
            assert other.alone() and (tmp_path / "b/.lock").read_text() == str(os.getpid())
            one.release()
            assert not one.alone()
