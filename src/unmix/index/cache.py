"""Derived files that can always be made again: kept in a hidden folder beside the index, never part of it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unmix.core.atomic import atomic_folder, disk_errors, sweep
from unmix.core.config import semantic_hash
from unmix.core.errors import CorruptError, MachineError, ResumeError
from unmix.core.lock import folder_lock
from unmix.core.manifest import read_manifest, require_whole, write_manifest
from unmix.index.layout import DOCUMENTS, KIND, MASK, TOKENS

KIND_OF_CACHE = "index-cache"


@dataclass(frozen=True)
class Cache:
    """A whole cache folder."""

    folder: Path

    def size(self, name: str) -> int:
        """Bytes of one of its files."""
        return (self.folder / name).stat().st_size


def cache_folder(index: Path) -> Path:
    """Where the caches of an index lie: `.NAME.cache` beside it. It may be deleted at any time."""
    return index.resolve().with_name(f".{index.resolve().name}.cache")


def cached(index: Path, name: str, key: str, make: Callable[[Path], None]) -> Cache:
    """The cache `name` for what `key` stands for: found, or made by `make(folder)` and put in place whole.

    Where nothing can be written beside the index, or another process is just writing there, it is made in a temporary
    folder that goes with the returned object.
    """
    place = cache_folder(index) / name
    try:
        if require_whole(place, KIND_OF_CACHE).get("key") == key:
            return Cache(place)
    except CorruptError:
        pass  # absent, or broken: made again below
    try:
        with folder_lock(place.parent):
            sweep(place)
            with atomic_folder(place) as folder:
                make(folder)
                write_manifest(folder, KIND_OF_CACHE, key=key)
        return Cache(place)
    except (MachineError, ResumeError):
        elsewhere = Cache(Path(tempfile.mkdtemp(prefix="unmix-index-")))
        weakref.finalize(elsewhere, shutil.rmtree, elsewhere.folder, ignore_errors=True)
        with disk_errors(elsewhere.folder):
            make(elsewhere.folder)
        return elsewhere


def text_key(index: Path) -> str:
    """What decides the text of an index: tokens, masks and document borders."""
    return _key(index, lambda name: name in (TOKENS, MASK, DOCUMENTS))


def coder_key(index: Path, folder: str) -> str:
    """What decides the codes of one coder: the text, and everything in its folder but the derived statistics."""
    own, derived = f"{folder}/", f"{folder}/statistics/"
    return _key(index, lambda name: name == TOKENS or (name.startswith(own) and not name.startswith(derived)))


def _key(index: Path, wanted: Callable[[str], bool]) -> str:
    files = read_manifest(index, KIND)["files"]
    return semantic_hash({name: entry for name, entry in files.items() if wanted(name)})
