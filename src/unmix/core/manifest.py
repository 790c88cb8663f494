"""A folder's manifest: what it is, and the length and SHA-256 of every file in it. Written last."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from unmix.core.atomic import sha256_file, write_json
from unmix.core.errors import ConfigError, CorruptError

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class Problem:
    """One file that is not what its manifest says."""

    path: Path
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, expected {self.expected}"


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest's entry for one file: `{"bytes": int, "sha256": hex}`."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_manifest(folder: str | Path, kind: str, files: list[str] | None = None, **meta: Any) -> dict[str, Any]:
    """Hash `files` (default: every file below `folder`) and write `manifest.json`, last of all."""
    folder = Path(folder)
    if files is None:
        files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        **meta,
        "files": {name: describe_file(folder / name) for name in files},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """Read `manifest.json`; `CorruptError` where it is absent, unreadable, of another kind or schema."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CorruptError(f"{path}: missing, so {folder} is not a whole {kind} folder; make it again")
    manifest = _parse(path)
    if manifest.get("kind") != kind:
        raise CorruptError(f"{path}: kind is {manifest.get('kind')!r}, expected {kind!r}")
    return manifest


def _parse(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptError(f"{path}: not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise CorruptError(f"{path}: the top is {type(manifest).__name__}, expected an object")
    tree = cast("dict[str, Any]", manifest)
    if tree.get("schema") != SCHEMA:
        raise CorruptError(f"{path}: schema {tree.get('schema')!r}, this version reads {SCHEMA}")
    if not isinstance(tree.get("files"), dict):
        raise CorruptError(f"{path}: lists no files")
    return tree


def verify_folder(folder: str | Path, deep: bool = True) -> list[Problem]:
    """Every file that is missing, of another length or (with `deep`) of another hash. Empty is good.

    Where a listed file is itself the manifest of a folder further down, and is as it should be, what it lists is
    checked too. `CorruptError` where the manifest itself is missing or unreadable.
    """
    folder = Path(folder)
    manifest = _parse(folder / MANIFEST)
    problems: list[Problem] = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(Problem(path, "no file", f"{entry['bytes']} bytes"))
            continue
        size = path.stat().st_size
        if size != entry["bytes"]:
            problems.append(Problem(path, f"{size} bytes", f"{entry['bytes']} bytes"))
        elif deep and (digest := sha256_file(path)) != entry["sha256"]:
            problems.append(Problem(path, f"sha256 {digest[:12]}…", f"{entry['sha256'][:12]}…"))
        elif path.name == MANIFEST:
            problems += verify_folder(path.parent, deep)
    return problems


def covered(folder: str | Path) -> set[Path]:
    """The folders whose manifests a folder's manifest lists: `verify_folder` checks them with it."""
    folder = Path(folder)
    return {(folder / name).parent for name in _parse(folder / MANIFEST)["files"] if Path(name).name == MANIFEST}


def require_whole(folder: str | Path, kind: str, deep: bool = False) -> dict[str, Any]:
    """The manifest of a folder whose files are all there (with `deep`: all hashes right), else `CorruptError`."""
    manifest = read_manifest(folder, kind)
    problems = verify_folder(folder, deep=deep)
    if problems:
        raise CorruptError(f"corrupt {kind} folder: " + "; ".join(str(p) for p in problems[:3]))
    return manifest


def refuse_foreign(folder: str | Path, kind: str) -> None:
    """`ConfigError` where `folder` holds anything but an older whole `kind` folder: replacing it would delete that."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        manifest = read_manifest(folder, kind)
    except CorruptError as error:
        raise ConfigError(f"{folder}: is not empty and holds no {kind} ({error}); choose another folder") from error
    listed = {MANIFEST, *(Path(name).parts[0] for name in manifest["files"])}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in listed)
    if foreign:
        raise ConfigError(f"{folder}: holds {foreign[0]!r}, which is not part of the {kind}; choose another folder")
