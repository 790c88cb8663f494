"""Rows of activations kept for training: in memory, or one memory-mapped file a hook."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unmix.core.atomic import atomic_folder, disk_errors
from unmix.core.config import semantic_hash
from unmix.core.errors import ConfigError, DataError, MachineError
from unmix.core.manifest import require_whole, write_manifest
from unmix.core.progress import task
from unmix.core.seeds import slug
from unmix.data.order import Order
from unmix.train.module_rows import RowReader

log = logging.getLogger("unmix")

KIND = "rows"
BUDGET = 4 * 2**30
"""Bytes of rows that are kept where nobody says."""
SHUFFLED = 2**30
"""Bytes of a file inside which rows are shuffled: that much is read from all over at once."""
HASHED_WHOLE = 8 * 2**30
"""Bytes of a store up to which every hash is checked before use: a few seconds. Above, lengths alone."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class Store:
    """All rows by hook, and a hash of what they are; rows lie in the order they were collected in."""

    rows: Mapping[str, Tensor]
    """[rows, d] each."""
    hash: str
    mapped: bool
    """Whether the rows are a memory map."""


class PairSource:
    """Rows of what one coder reads and writes as `(input, target)` batches, addressed by step alone."""

    def __init__(self, store: Store, reads: tuple[str, ...], writes: tuple[str, ...], seed: int) -> None:
        """In memory all rows are shuffled together, of a file those of about 1 GiB at a time."""
        self.x, self.target = [store.rows[hook] for hook in reads], [store.rows[hook] for hook in writes]
        self.same, n = reads == writes, self.x[0].shape[0]
        bytes_a_row = self.x[0].shape[1] * self.x[0].element_size()
        self._order = Order(seed, n, min(n, max(65536, SHUFFLED // bytes_a_row)) if store.mapped else n)
        self.hash = semantic_hash(store.hash, list(reads), list(writes), seed)

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.x[0].shape[0]

    def batch(self, step: int, size: int) -> tuple[Float[Tensor, "size d_in"], Float[Tensor, "size d_out"]]:
        """Rows of the seeded order, float32."""
        ids = torch.from_numpy(np.asarray(self._order.batch(step, size), dtype=np.int64))
        x = torch.cat([rows[ids].float() for rows in self.x], dim=-1)
        return x, x if self.same else torch.cat([rows[ids].float() for rows in self.target], dim=-1)


def collect(
    reader: RowReader, loader: Iterable[Any], pairs: list[tuple[str, str]], limit: int | None, budget: int,
    folder: Path | None = None, key: str = "",
) -> Store:  # fmt: skip
    """Run the module over the loader once and keep the rows: in memory, or in `folder` where one is given.

    With `limit` the loader is read again until every hook has that many rows. Where `budget` bytes are full the rest
    of the loader is left out, and the log says so. Raises `DataError` for a loader without batches, an iterator that
    ends before `limit`, and hooks of one coder that give different numbers of rows.
    """
    batches = _checked(reader, loader, pairs, limit)
    if folder is None:
        kept = _Memory()
        _fill(kept, batches, loader, limit, budget)
        return Store(kept.close(), "memory", mapped=False)
    with atomic_folder(folder) as temp, _Files(temp) as files:
        _fill(files, batches, loader, limit, budget)
        files.close()
        write_manifest(temp, KIND, key=key, hooks=files.shapes)
    return open_store(folder, key)


def open_store(folder: Path, key: str) -> Store:
    """The rows that `collect` left in `folder`; `CorruptError` where a file is damaged."""
    manifest = require_whole(folder, KIND)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    if total <= HASHED_WHOLE:
        require_whole(folder, KIND, deep=True)
    if manifest["key"] != key:
        raise ConfigError(f"{folder}: holds rows of other hooks or another module; choose another folder")
    rows: dict[str, Tensor] = {}
    for hook, (n, width, dtype) in manifest["hooks"].items():
        flat = np.memmap(folder / f"{slug(hook)}.bin", dtype=np.uint8, mode="c")
        rows[hook] = torch.from_numpy(flat).view(_DTYPES[dtype]).view(n, width)
    return Store(rows, semantic_hash(sorted(entry["sha256"] for entry in manifest["files"].values())), mapped=True)


def _checked(
    reader: RowReader, loader: Iterable[Any], pairs: list[tuple[str, str]], limit: int | None
) -> Iterator[dict[str, Tensor]]:
    """Rows of every batch, the loader read again and again where there is a limit."""
    one_shot = iter(loader) is loader
    had, passes = 0, 0
    while True:
        before = had
        for batch in loader:
            found = reader.rows(batch)
            for read, write in pairs:
                if found[read].shape[0] != found[write].shape[0]:
                    raise DataError(
                        f"{read} gives {found[read].shape[0]} rows a batch and {write} {found[write].shape[0]}: "
                        "a coder needs as many of one as of the other"
                    )
            had += min(rows.shape[0] for rows in found.values())
            yield found
        passes += 1
        if had == before:
            again = "; it is an iterator, which gives its batches once: give a list or a DataLoader" if one_shot else ""
            raise DataError(f"the loader gave no {'batch' if passes == 1 else 'more batches'}{again}")
        if limit is None or had >= limit:
            return
        if one_shot:
            raise DataError(
                f"the loader ended after {had} of the {limit} rows asked for and is an iterator, which gives its "
                "batches once: give a list or a DataLoader, which can be read again, or ask for fewer tokens"
            )


def _fill(
    kept: _Memory | _Files, batches: Iterator[dict[str, Tensor]], loader: Iterable[Any], limit: int | None, budget: int
) -> None:
    expected = limit or (len(loader) if isinstance(loader, Sized) else 0)
    had: dict[str, int] = {}
    used = 0
    with task("collect", expected, unit="rows" if limit else "batches") as bar:
        for found in batches:
            if limit is not None:
                found = {hook: rows[: limit - had.get(hook, 0)] for hook, rows in found.items()}
            size = sum(rows.numel() * rows.element_size() for rows in found.values())
            if used + size > budget:
                _full(used, size, budget, had)
                return
            if used == 0 and isinstance(loader, Sized) and limit is None:
                kept.announce(min(size * len(loader), budget))
            used += size
            for hook, rows in found.items():
                kept.add(hook, rows)
                had[hook] = had.get(hook, 0) + rows.shape[0]
            bar.advance(min(rows.shape[0] for rows in found.values()) if limit else 1)
            if limit is not None and min(had.values()) >= limit:
                return


def _full(used: int, size: int, budget: int, had: dict[str, int]) -> None:
    if not used:
        raise ConfigError(f"one batch's rows take {size:,} bytes, more than the budget of {budget:,}: raise budget=")
    log.warning(
        "%d rows fill the budget of %.1f MiB; the rest of the loader is left out (raise budget=, or give a folder= to "
        "keep rows on disk)", min(had.values()), budget / 2**20,
    )  # fmt: skip


class _Memory:
    """Rows as lists of batches, joined one hook after the other."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def announce(self, size: int) -> None:
        log.info("collect: about %.1f MiB of activations in memory", size / 2**20)

    def add(self, hook: str, rows: Tensor) -> None:
        self._parts.setdefault(hook, []).append(rows)

    def close(self) -> dict[str, Tensor]:
        return {hook: torch.cat(self._parts.pop(hook)) for hook in list(self._parts)}


class _Files(ExitStack):
    """One raw file a hook, appended to."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._handles: dict[str, BinaryIO] = {}
        self.shapes: dict[str, tuple[int, int, str]] = {}

    def announce(self, size: int) -> None:
        log.info("collect: about %.1f MiB of activations on disk", size / 2**20)
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise MachineError(
                f"{self._folder.parent}: the activations take about {size:,} bytes and {free:,} are free; "
                "ask for fewer tokens or a smaller budget="
            )

    def add(self, hook: str, rows: Tensor) -> None:
        path = self._folder / f"{slug(hook)}.bin"
        with disk_errors(path):
            if hook not in self._handles:
                if path.exists():
                    raise ConfigError(f"the hooks {hook!r} and another would share the file {path.name}")
                self._handles[hook] = self.enter_context(path.open("wb"))
            rows.contiguous().view(-1).view(torch.uint8).numpy().tofile(self._handles[hook])
        n, width, dtype = self.shapes.get(hook, (0, rows.shape[1], str(rows.dtype).removeprefix("torch.")))
        self.shapes[hook] = (n + rows.shape[0], width, dtype)
