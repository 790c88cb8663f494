"""Files and folders are whole or absent, whatever interrupts the writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unmix.core import atomic
from unmix.core.atomic import atomic_file, atomic_folder, sha256_file, sweep, write_json, write_text
from unmix.core.errors import ConfigError, MachineError


def names(folder: Path) -> list[str]:
    """Everything in `folder`, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_older_one_whole(tmp_path: Path) -> None:
    """And leaves nothing beside it."""
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert names(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_exception_inside_leaves_the_older_file(tmp_path: Path) -> None:
    """Half of a file was written, then something broke."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), atomic_file(path) as temp:
        temp.write_text("half", encoding="utf-8")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    """NaN never reaches a file."""
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"x": float("nan")})
    assert names(tmp_path) == []


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of putting a new folder in the place of an older one."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux swaps two names in one step")
    return request.param


def test_a_folder_replaces_the_older_one_whole(tmp_path: Path, swap: str) -> None:
    """No file of the older folder shines through."""
    path = tmp_path / "coder"
    for n in (1, 2):
        with atomic_folder(path) as temp:
            (temp / "sub").mkdir()
            (temp / "sub" / f"{n}.txt").write_text(str(n), encoding="utf-8")
    assert names(path / "sub") == ["2.txt"]
    assert names(tmp_path) == ["coder"]
    assert path.stat().st_mode & 0o777 == 0o755


def test_an_exception_inside_leaves_the_older_folder(tmp_path: Path, swap: str) -> None:
    """As with files."""
    path = tmp_path / "coder"
    with atomic_folder(path) as temp:
        (temp / "old").touch()
    with pytest.raises(KeyError), atomic_folder(path) as temp:
        (temp / "new").touch()
        raise KeyError
    assert (names(tmp_path), names(path)) == (["coder"], ["old"])


def test_a_rename_that_fails_puts_the_older_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot swap, the older folder is away for a moment; not for longer."""
    path = tmp_path / "coder"
    with atomic_folder(path) as temp:
        (temp / "old").touch()
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(MachineError), atomic_folder(path) as temp:
        (temp / "new").touch()
    assert (names(tmp_path), names(path)) == (["coder"], ["old"])


def test_a_file_in_the_place_of_a_folder_is_left_alone(tmp_path: Path) -> None:
    """It is the user's."""
    path = tmp_path / "coder"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"coder: is a file, expected a folder$"), atomic_folder(path):
        raise AssertionError("never entered")
    assert path.read_text(encoding="utf-8") == "mine"


_KILLED = """
import os, signal, sys
from pathlib import Path
from unmix.core import atomic
kind, moment, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if kind == "folder-renames":
    atomic._exchange = lambda one, other: False

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, when=lambda *a: True):
    inner = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: die() if when(*a) else inner(*a, **k))

if moment == "fsync":
    before(os, "fsync")
elif moment == "rename":
    before(Path, "replace"); before(Path, "rename"); before(atomic, "_exchange")
elif moment == "between renames":
    before(Path, "rename", lambda one, other: one.name.endswith(".tmp"))
elif moment == "removal":
    before(atomic.shutil, "rmtree")
if kind == "file":
    with atomic.atomic_file(path) as temp:
        temp.write_text("new")
        moment == "writing" and die()
else:
    with atomic.atomic_folder(path) as temp:
        (temp / "new").write_text("new")
        moment == "writing" and die()
sys.exit("was not killed")
"""


@pytest.mark.parametrize(
    ("kind", "moment", "exists"),
    [
        *(("file", moment, exists) for moment in ("writing", "fsync", "rename") for exists in (False, True)),
        *(("folder", moment, exists) for moment in ("writing", "fsync", "rename") for exists in (False, True)),
        ("folder", "removal", True),
        ("folder-renames", "between renames", True),
    ],
)
def test_sigkill_shows_the_old_or_the_new_and_a_sweep_clears_the_rest(
    tmp_path: Path, kind: str, moment: str, exists: bool
) -> None:
    """At every moment of the writing; the next writer puts things in order."""
    path = tmp_path / "thing"
    writer: Callable[[], object] = (lambda: write_text(path, "old")) if kind == "file" else (lambda: _old_folder(path))
    if exists:
        writer()
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, kind, moment, str(path)], check=False, capture_output=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    if moment != "between renames":
        assert path.exists() == exists
    sweep(path)
    assert names(tmp_path) == (["thing"] if exists else [])
    if exists:
        shown = path.read_text(encoding="utf-8") if kind == "file" else names(path)[0]
        assert shown == ("new" if moment == "removal" else "old")


def _old_folder(path: Path) -> None:
    with atomic_folder(path) as temp:
        (temp / "old").touch()


def test_a_sweep_leaves_other_files_alone(tmp_path: Path) -> None:
    """Only the leftovers of this very name go, odd characters in it or not."""
    for name in ("a[1]", ".a[1].x.tmp", ".a1.x.tmp", "a.tmp", ".b.x.tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path / "a[1]")
    assert names(tmp_path) == sorted(["a[1]", ".a1.x.tmp", "a.tmp", ".b.x.tmp"])


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"), (errno.EACCES, "permission denied"),
    ],
)  # fmt: skip
def test_what_the_disk_refuses_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    """One message with the path, and exit code 3."""

    def refuse(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(MachineError, match=rf"^cannot write {tmp_path / 'a'}: {reason}$") as caught:
        write_text(tmp_path / "a", "new")
    assert caught.value.exit_code == 3
    message = rf"^cannot write {tmp_path / 'b'}: {reason}$"
    with pytest.raises(MachineError, match=message), atomic_folder(tmp_path / "b") as temp:
        (temp / "x").write_text("x", encoding="utf-8")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a"]


def test_other_errors_keep_their_own_name(tmp_path: Path) -> None:
    """A missing file inside the block is not the disk's refusal."""
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        (tmp_path / "nothing").read_text(encoding="utf-8")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    """For real, not by a patched call."""
    tmp_path.chmod(0o555)
    with pytest.raises(MachineError, match=r"permission denied$"):
        write_text(tmp_path / "a", "x")
    tmp_path.chmod(0o755)


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    """SHA-256 of three known bytes."""
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
