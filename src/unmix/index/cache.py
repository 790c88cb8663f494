"""Derived files that can always be made again: kept in a hidden folder beside the index, never part of it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmix.core.atomic import atomic_folder, disk_errors, sweep
from unmix.core.config import semantic_hash
from unmix.core.errors import CorruptError, MachineError, ResumeError
from unmix.core.lock import folder_lock
from unmix.core.manifest import read_manifest, require_whole, write_manifest
from unmix.index.layout import DOCUMENTS, KIND, MASK, TOKENS

KIND_OF_CACHE = "index-cache"
_ONE_AT_A_TIME = threading.Lock()


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
    with _ONE_AT_A_TIME:  # threads of this process wait for one another
        return _find(place, key) or _make(place, key, make)


def _find(place: Path, key: str) -> Cache | None:
    try:
        return Cache(place) if require_whole(place, KIND_OF_CACHE).get("key") == key else None
    except (CorruptError, KeyError, TypeError, AttributeError):
        return None  # absent, or broken


def _make(place: Path, key: str, make: Callable[[Path], None]) -> Cache:
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


@dataclass(frozen=True)
class Keys:
    """What caches stand for, as it was when the index was opened: another index may take its place meanwhile."""

    context: int
    files: dict[str, Any]
    """The entries of the index's manifest."""

    @classmethod
    def of(cls, index: Path, context: int) -> Keys:
        """Those of an index with contexts of this length, whose files are now being opened."""
        return cls(context, read_manifest(index, KIND)["files"])

    def text(self) -> str:
        """What decides the text of an index: tokens, masks, document borders, and the length of the contexts."""
        return self._key(lambda name: name in (TOKENS, MASK, DOCUMENTS))

    def coder(self, folder: str) -> str:
        """What decides the codes of one coder: the text, and everything in its folder but the derived statistics."""
        own, derived = f"{folder}/", f"{folder}/statistics/"
        return self._key(lambda name: name == TOKENS or (name.startswith(own) and not name.startswith(derived)))

    def _key(self, wanted: Callable[[str], bool]) -> str:
        files = {name: entry for name, entry in self.files.items() if wanted(name)}
        return semantic_hash({"context": self.context, "files": files})
