"""What lies where in a cache of delphi (and of sae_auto_interp before it).

latents/HOOK/FIRST_LAST.safetensors    latents FIRST to LAST, both included
    locations    [n, 3]: row, position, latent − FIRST; u16 or u32 (the earliest files: i64), in order of row
    activations  [n]: f16 (the earliest files: f32)
    tokens       [rows, context]; absent in old caches and where they were left out
latents/HOOK/config.json               which text, which model
unmix/                                 written by unmix, not looked at by delphi: documents, roles, masks, token strings
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int64, Integer

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores import Store, open_store

LATENTS, EXTRA = "latents", "unmix"
THRESHOLD = 1e-5
"""delphi keeps what is larger than this in absolute value."""
_NAME = re.compile(r"(\d+)_(\d+)\.safetensors")
_SCAN = 1 << 20


class Split:
    """One file of a hook: the postings of latents `first` to `last`, both included, in order of row."""

    def __init__(self, path: Path, first: int, last: int) -> None:
        self.path, self.first, self.last = path, first, last
        self.store: Store = open_store(path)
        headers = self.store.headers()
        for name, dimensions in (("locations", 2), ("activations", 1), ("tokens", 2)):
            if name == "tokens" and name not in headers:
                continue
            if name not in headers or len(headers[name].shape) != dimensions:
                found = f"{list(headers[name].shape)}" if name in headers else f"only {', '.join(sorted(headers))}"
                raise FormatError(f"{path}: found {found}, expected {name} of {dimensions} dimensions")
        self.locations: Integer[np.ndarray, "n 3"] = self.store.tensor("locations").numpy()
        self.activations: Float[np.ndarray, " n"] = self.store.tensor("activations").numpy()
        shape = self.locations.shape
        if shape[1] != 3 or shape[0] != len(self.activations):
            raise FormatError(
                f"{path}: locations are {list(shape)} and activations [{len(self.activations)}], "
                "expected [n, 3] and [n]"
            )

    @property
    def tokens(self) -> Integer[np.ndarray, "rows context"] | None:
        """Token ids, memory-mapped; None where they were left out."""
        return self.store.tensor("tokens").numpy() if "tokens" in self.store.headers() else None

    def order(self, rows: int, context: int) -> tuple[Int64[np.ndarray, " rows_plus_1"], np.ndarray | None]:
        """Where each row's entries start; and, for files that are not in order of row, the entries in that order.

        Reads the locations once, a stretch at a time. `CorruptError` where one lies outside the text or the split.
        """
        counts, sorted_so_far, before = np.zeros(rows + 1, np.int64), True, 0
        limits = np.array([rows, context, self.last - self.first + 1])
        for start in range(0, len(self.locations), _SCAN):
            part = self.locations[start : start + _SCAN].astype(np.int64)
            if (part < 0).any() or (part >= limits).any():
                bad = int(np.flatnonzero(((part < 0) | (part >= limits)).any(axis=1))[0])
                raise CorruptError(
                    f"{self.path}: entry {start + bad} is at row, position, latent {part[bad].tolist()}, outside of "
                    f"{limits.tolist()}"
                )
            counts[1:] += np.bincount(part[:, 0], minlength=rows)
            sorted_so_far &= bool(part[0, 0] >= before and (np.diff(part[:, 0]) >= 0).all())
            before = int(part[-1, 0])
        order = None if sorted_so_far else np.argsort(self.locations[:, 0], kind="stable")
        return np.cumsum(counts), order


@dataclass(frozen=True)
class Hook:
    """All splits of one hook, ascending."""

    folder: Path
    splits: tuple[Split, ...]

    @property
    def n_latents(self) -> int:
        """Latents of the coder: what the names of the files say."""
        return self.splits[-1].last + 1

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`; empty where there is none."""
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        try:
            return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CorruptError(f"{path}: not JSON ({error})") from error

    @property
    def tokens(self) -> Integer[np.ndarray, "rows context"] | None:
        """Token ids of the first split that holds them."""
        return next((split.tokens for split in self.splits if split.tokens is not None), None)


def open_hooks(folder: Path) -> dict[str, Hook]:
    """Every hook of a cache, by name. `folder`: the cache's, its `latents`, or that of one hook.

    `FormatError` where there is none, or where latents are missing between two files.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    for place in (folder / LATENTS, folder):
        found = {child.name: child for child in sorted(place.glob("*/")) if _files(child)}
        if found:
            return {name: _hook(child) for name, child in found.items()}
    if _files(folder):
        return {folder.name: _hook(folder)}
    raise FormatError(f"{folder}: holds no delphi cache (latents/HOOK/FIRST_LAST.safetensors)")


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    matches = ((_NAME.fullmatch(file.name), file) for file in folder.glob("*.safetensors"))
    return sorted((int(match[1]), int(match[2]), file) for match, file in matches if match)


def _hook(folder: Path) -> Hook:
    expected, splits = 0, list[Split]()
    for first, last, path in _files(folder):
        if first != expected or last < first:
            raise FormatError(
                f"{path}: holds latents {first} to {last}, expected a file that begins at {expected}; is one missing?"
            )
        splits.append(Split(path, first, last))
        expected = last + 1
    return Hook(folder, tuple(splits))
