"""A manifest names every file that is not what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unmix.core.errors import ConfigError, CorruptError
from unmix.core.manifest import (
    MANIFEST,
    covered,
    read_manifest,
    refuse_foreign,
    require_whole,
    verify_folder,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one of them below."""
    folder = tmp_path / "thing"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(100)))
    (folder / "sub" / "b.txt").write_text("hello", encoding="utf-8")
    write_manifest(folder, "thing", answer=42)
    return folder


def flip(path: Path) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    """The last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    """One byte more."""
    path.write_bytes(path.read_bytes() + b"x")


def test_a_whole_folder_has_no_problems(folder: Path) -> None:
    """And its manifest holds what it was given."""
    manifest = require_whole(folder, "thing", deep=True)
    assert manifest["answer"] == 42
    assert set(manifest["files"]) == {"a.bin", "sub/b.txt"}
    assert verify_folder(folder) == []


@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt"])
@pytest.mark.parametrize(
    ("damage", "shallow", "message"),
    [
        (flip, False, r"found sha256 [0-9a-f]{12}…, expected [0-9a-f]{12}…$"),
        (truncate, True, r"found \d+ bytes, expected \d+ bytes$"),
        (lengthen, True, r"found \d+ bytes, expected \d+ bytes$"),
        (Path.unlink, True, r"found no file, expected \d+ bytes$"),
    ],
)
def test_damage_is_found_and_named(
    folder: Path, name: str, damage: Callable[[Path], None], shallow: bool, message: str
) -> None:
    """A flipped bit costs a full read to find; a wrong length does not."""
    damage(folder / name)
    (problem,) = verify_folder(folder)
    assert problem.path == folder / name
    assert bool(verify_folder(folder, deep=False)) == shallow
    with pytest.raises(CorruptError, match=rf"^corrupt thing folder: .*{name}: {message}") as caught:
        require_whole(folder, "thing", deep=True)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest\.json: not JSON"),
        ("[1]", r"manifest\.json: the top is list, expected an object"),
        ('{"schema": 1, "kind": "other", "files": {}}', r"manifest\.json: kind is 'other', expected 'thing'"),
        ('{"schema": 99, "kind": "thing", "files": {}}', r"manifest\.json: schema 99, this version reads 1"),
        ('{"schema": 1, "kind": "thing"}', r"manifest\.json: lists no files"),
    ],
)
def test_a_manifest_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    """Unreadable, of another kind, of the future."""
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(CorruptError, match=message):
        read_manifest(folder, "thing")


def test_a_folder_without_manifest_is_not_whole(folder: Path) -> None:
    """It is written last, so its absence means that the writer was stopped."""
    (folder / MANIFEST).unlink()
    with pytest.raises(CorruptError, match=r"missing, so .*thing is not a whole thing folder; make it again$"):
        require_whole(folder, "thing")
    with pytest.raises(CorruptError, match=r"manifest\.json: missing$"):
        verify_folder(folder)


def test_listed_files_only(folder: Path) -> None:
    """A caller that names its files leaves the others out."""
    write_manifest(folder, "thing", ["a.bin"])
    (folder / "sub" / "b.txt").unlink()
    assert verify_folder(folder) == []
    assert json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["schema"] == 1


def test_only_an_older_one_of_the_same_kind_may_be_replaced(folder: Path, tmp_path: Path) -> None:
    """Writers that replace a folder ask this first: it would delete what stands there."""
    refuse_foreign(folder, "thing")
    refuse_foreign(tmp_path / "absent", "thing")
    (tmp_path / "empty").mkdir()
    refuse_foreign(tmp_path / "empty", "thing")
    with pytest.raises(ConfigError, match=r"thing: is not empty and holds no coder \(.*kind is 'thing'"):
        refuse_foreign(folder, "coder")
    (folder / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"thing: holds 'notes\.txt', which is not part of the thing"):
        refuse_foreign(folder, "thing")


def test_a_listed_manifest_speaks_for_its_own_folder(tmp_path: Path) -> None:
    """Files of a folder further down are checked once, through the manifest that lists them."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "data").write_text("data")
    (tmp_path / "top").write_text("top")
    write_manifest(inner, "part")
    write_manifest(tmp_path, "whole", ["top", "inner/manifest.json"])
    assert verify_folder(tmp_path) == [] and covered(tmp_path) == {inner} and covered(inner) == set()
    (inner / "data").write_text("atad")
    assert [problem.path for problem in verify_folder(tmp_path)] == [inner / "data"]
    assert verify_folder(tmp_path, deep=False) == []
    (inner / "manifest.json").write_text("not the one that was listed")
    assert [problem.path for problem in verify_folder(tmp_path)] == [inner / "manifest.json"]
