"""Putting an index in place: what every way of building one ends with."""

from __future__ import annotations

import glob
import multiprocessing
import os
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from unmix.core.atomic import atomic_folder, disk_errors, write_json
from unmix.core.lock import folder_lock
from unmix.core.manifest import MANIFEST, write_manifest
from unmix.index.checks import check_place
from unmix.index.derive import derive
from unmix.index.frame import Frame
from unmix.index.layout import (
    KIND,
    MASK,
    ROLE_BYTES,
    TOKENS,
    CoderEntry,
    IndexMeta,
    Segment,
    open_raw,
    segment_folder,
)
from unmix.index.orphans import die_with_parent

LOCK = ".lock"
VOCAB = "vocab.json"
STALE = 60.0
"""Seconds after which an empty hidden folder is nobody's."""


@contextmanager
def new_index(folder: Path) -> Generator[Path]:
    """A hidden folder beside `folder` that takes its place on success, whatever index was there before.

    Raises:
        ConfigError: `folder` holds something else than an index.
        ResumeError: another process is writing an index there.
    """
    check_place(folder)
    sweep_index(folder)
    with ExitStack() as lock:
        with atomic_folder(folder) as temp:
            lock.enter_context(folder_lock(temp))
            yield temp
        (folder / LOCK).unlink(missing_ok=True)


def sweep_index(folder: Path) -> None:
    """Remove what killed writers of this index left. One that still runs holds its lock: `ResumeError` then."""
    # Exactly the eight characters of `mkdtemp`: `.a.*.tmp` would be those of an index `a.b` too.
    for stale in folder.parent.glob(f".{glob.escape(folder.name)}.????????.tmp"):
        if (stale / TOKENS).is_file() or (stale / LOCK).is_file():
            with folder_lock(stale):
                shutil.rmtree(stale, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # its writer ended
                if not any(stale.iterdir()) and stale.stat().st_mtime < time.time() - STALE:
                    stale.rmdir()


def describe(
    folder: Path, frame: Frame, n_contexts: int, segments: Sequence[Segment], meta: Mapping[str, Any]
) -> IndexMeta:
    """What `index.json` says of an index whose token files are in `folder`."""
    roles = open_raw(folder / ROLE_BYTES, np.uint8, (n_contexts,))
    mask = open_raw(folder / MASK, np.uint8, (n_contexts, -(-frame.context // 8)))
    counted = np.zeros(len(frame.roles), np.int64)
    for first in range(0, n_contexts, 2**16):
        part = slice(first, first + 2**16)
        unmasked = np.bitwise_count(mask[part]).sum(axis=1, dtype=np.int64)
        counted += np.bincount(roles[part], unmasked, len(frame.roles)).astype(np.int64)
    coders = {name: CoderEntry(frame.folders[name], n) for name, n in frame.latents.items()}
    slices = {name: tuple(values) for name, values in frame.slices.items()}
    return IndexMeta(
        tuple(frame.roles), frame.context, n_contexts, frame.token_dtype.name, tuple(counted.tolist()), coders,
        tuple(segments), dict(meta), slices,
    )  # fmt: skip


def seal(
    folder: Path, description: IndexMeta, vocab: Sequence[str] | None, budget_bytes: int, workers: int = 1
) -> None:
    """Statistics, vocabulary, `index.json` and, last, the manifest of a folder with token files and segments."""
    _derive_all(folder, description, budget_bytes, min(workers, len(description.coders)))
    if vocab is not None:
        write_json(folder / VOCAB, list(vocab), indent=None)
    description.write(folder)
    with disk_errors(folder):
        write_manifest(folder, KIND, listed(folder, description))


def _derive_all(folder: Path, description: IndexMeta, budget_bytes: int, workers: int) -> None:
    """The statistics of every coder; several coders at once where there are workers for it."""
    if workers < 2:
        for name in description.coders:
            derive(folder, description, name, budget_bytes)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=die_with_parent) as pool:
        share = max(budget_bytes // workers, 1)
        for done in [pool.submit(derive, folder, description, name, share) for name in description.coders]:
            done.result()


def listed(folder: Path, description: IndexMeta) -> list[str]:
    """What the index's own manifest lists: every file, but of a segment only its manifest, which lists the others."""
    segments = {
        f"{entry.folder}/{segment_folder(i)}"
        for entry in description.coders.values()
        for i in range(len(description.segments))
    }
    found = (f.relative_to(folder) for f in folder.rglob("*") if f.is_file())
    return sorted(
        f.as_posix()
        for f in found
        if f.name != LOCK and (f.parent.as_posix() not in segments or f.name == MANIFEST) and f.as_posix() != MANIFEST
    )


def link(source: Path, target: Path) -> None:
    """One file under a second name; a copy where the file system has no second names."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def link_folder(source: Path, target: Path) -> None:
    """Every file directly in a folder, as `link` does."""
    for file in sorted(source.iterdir()):
        link(file, target / file.name)
