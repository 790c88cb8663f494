"""Names of files that a file gives: they may only name what lies beside it."""

from __future__ import annotations

from pathlib import Path

from unmix.core.errors import FormatError


def sibling(path: Path, name: str, shown: str) -> Path:
    """The file `name` beside `path`, which names it. `FormatError` where that is anywhere else, through links too.

    The hub's cache is made of links (`snapshots/REV/file` → `blobs/HASH`): those stay inside one repository.
    """
    if not name or name in (".", "..") or name.startswith("~") or any(c in name for c in "/\\:\0"):
        raise FormatError(f"{shown}: it names the file {name!r:.120}; allowed are plain names in the same folder")
    there = path.parent / name
    target = there.resolve()
    if target.parent != path.parent.resolve() and target.parent not in _blobs(path):
        raise FormatError(f"{shown}: {name} is a link out of its folder (to {target}): refused")
    return there


def _blobs(path: Path) -> list[Path]:
    """The folder of blobs, where `path` lies in the hub's cache."""
    absolute = path.parent.absolute()
    return [
        (folder.parent / "blobs").resolve() for folder in (absolute, *absolute.parents) if folder.name == "snapshots"
    ]
