"""Notes on what was fetched whole, so that a place opens without the network, at the same commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from unmix.core.atomic import write_json
from unmix.formats.sources.base import cache_folder


def note_path(place: str) -> Path:
    """The file that holds the note on `place`."""
    return cache_folder("places") / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.json"


def write_note(place: str, path: Path, files: Sequence[Path], origin: dict[str, Any]) -> None:
    """Note that `place` lies at `path`, and that all its `files` have arrived."""
    sizes = {str(file): file.stat().st_size for file in files}
    write_json(note_path(place), {"place": place, "path": str(path), "files": sizes, "origin": origin})


def read_note(place: str) -> tuple[Path, dict[str, Any]] | None:
    """Path and origin of an earlier fetch, where each of its files is still there with the size it had; else None."""
    try:
        note = json.loads(note_path(place).read_text(encoding="utf-8"))
        files = cast("dict[str, int]", note["files"])
        whole = note["place"] == place and all(Path(f).stat().st_size == size for f, size in files.items())
        return (Path(note["path"]), dict(note["origin"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
