"""The shared side of an open index: tokens, documents, roles, masks, token strings; and one coder's postings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, UInt8

from unmix.core.errors import CorruptError
from unmix.index.layout import (
    DOCUMENTS,
    MASK,
    OFFSETS,
    POSITIONS,
    ROLE_BYTES,
    SCALE,
    TOKENS,
    VALUES,
    CoderEntry,
    IndexMeta,
    RoleFilter,
    open_raw,
    role_ids,
    segment_folder,
    slice_file,
)
from unmix.index.merge import from_half
from unmix.index.part import Part


class TokenStore:
    """Tokens and what is known of each context; memory maps, nothing is read until it is asked for."""

    def __init__(self, folder: Path, meta: IndexMeta) -> None:
        shape = (meta.n_contexts, meta.context)
        self.folder, self.meta = folder, meta
        self.context, self.n_contexts, self.roles = meta.context, meta.n_contexts, meta.roles
        self.tokens: np.ndarray = open_raw(folder / TOKENS, meta.token_dtype, shape)
        self.documents: Int32[np.ndarray, "n_contexts context"] = open_raw(folder / DOCUMENTS, np.int32, shape)
        self.role_of: UInt8[np.ndarray, " n_contexts"] = open_raw(folder / ROLE_BYTES, np.uint8, shape[:1])
        self._mask = open_raw(folder / MASK, np.uint8, (meta.n_contexts, -(-meta.context // 8)))
        self._pools: dict[tuple[int, ...] | None, np.ndarray] = {}

    def mask(self, contexts: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, "n context"]:
        """True where a position counts."""
        return np.unpackbits(self._mask[contexts], axis=1, count=self.context).astype(bool)

    @cached_property
    def slices(self) -> dict[str, UInt8[np.ndarray, "n_contexts context"]]:
        """Of each slicing, the value (by number) that every position belongs to."""
        shape = (self.n_contexts, self.context)
        return {name: open_raw(self.folder / slice_file(name), np.uint8, shape) for name in self.meta.slices}

    def contexts_of(self, role: RoleFilter) -> Int64[np.ndarray, " n"]:
        """Ids of the contexts of one role, several, or all of them; ascending."""
        ids = role_ids(self.roles, role)
        key = None if ids is None else tuple(ids)
        if key not in self._pools:
            keep = np.ones(self.n_contexts, bool) if ids is None else np.isin(self.role_of, ids)
            self._pools[key] = np.flatnonzero(keep)
        return self._pools[key]

    @cached_property
    def vocab(self) -> list[str] | None:
        """Display string of every token id; None where the index was built without."""
        path = self.folder / "vocab.json"
        if not path.is_file():
            return None
        try:
            return cast("list[str]", json.loads(path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CorruptError(f"{path}: not JSON ({error})") from error

    def strings(self, ids: Integer[np.ndarray, " n"] | Sequence[int]) -> list[str] | None:
        """Display strings of token ids; an id past the vocabulary shows as `<id>`."""
        if self.vocab is None:
            return None
        return [self.vocab[i] if 0 <= i < len(self.vocab) else f"<{i}>" for i in map(int, ids)]


class PostingStore:
    """One coder's segments and scales."""

    def __init__(self, folder: Path, meta: IndexMeta, entry: CoderEntry) -> None:
        self.folder, self.meta, self.n_latents = folder / entry.folder, meta, entry.n_latents
        self.scale: Float32[np.ndarray, " latents"] = open_raw(self.folder / SCALE, np.float32, (entry.n_latents,))
        self._segments = [self._open(i) for i in range(len(meta.segments))]

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        folder = self.folder / segment_folder(number)
        offsets = open_raw(folder / OFFSETS, np.uint64, (self.n_latents + 1,))
        total = int(offsets[-1])
        values = open_raw(folder / VALUES, np.float16, (total,))
        return offsets, open_raw(folder / POSITIONS, np.uint32, (total,)), values

    def read(self, latent: int) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Global positions, ascending, and values of one latent: one contiguous read for each segment.

        Raises `CorruptError` naming the file where they cannot be what was written.
        """
        positions: list[np.ndarray] = []
        values: list[np.ndarray] = []
        for number, (offsets, stored, halves) in enumerate(self._segments):
            start, end = int(offsets[latent]), int(offsets[latent + 1])
            segment = self.meta.segments[number]
            if not 0 <= start <= end <= len(stored):
                raise self._corrupt(number, OFFSETS, latent, f"postings {start} to {end} of {len(stored)}")
            local = stored[start:end].astype(np.int64)
            if len(local) and (local[-1] >= segment.tokens or (np.diff(local) <= 0).any()):
                raise self._corrupt(number, POSITIONS, latent, "positions that do not ascend inside the segment")
            positions.append(local + segment.base)
            values.append(from_half(halves[start:end], self.scale[latent]))
        if len(positions) == 1:
            return positions[0], values[0]
        return np.concatenate(positions), np.concatenate(values)

    def within(
        self, latent: int, contexts: Int64[np.ndarray, " contexts"]
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Positions, ascending, and values of the firings inside some contexts (ids, ascending)."""
        positions, values = self.read(latent)
        keep = np.isin(positions // self.meta.context, contexts)
        return positions[keep], values[keep]

    def strongest(
        self, latent: int, at_least: int
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"], np.float32]:
        """`(positions, values, floor)`: every firing with `|value| >= floor`, positions ascending.

        At least `at_least` of them; where the latent has no more than that, all of them and a floor of 0.
        """
        positions, values = self.read(latent)
        if len(positions) <= at_least:
            return positions, values, np.float32(0)
        strength = np.abs(values)
        floor = np.partition(strength, -at_least)[-at_least] if at_least else np.float32(np.inf)
        keep = strength >= floor
        return positions[keep], values[keep], np.float32(floor)

    def part(self, first: int, last: int) -> Part:
        """Every posting of latents `[first, last)`, latent by latent, positions global and ascending."""
        read = [self.read(latent) for latent in range(first, last)]
        counts = np.array([len(positions) for positions, _ in read], np.int64)
        return Part(
            counts,
            np.concatenate([positions for positions, _ in read] or [np.empty(0, np.int64)]),
            np.concatenate([values for _, values in read] or [np.empty(0, np.float32)]),
        )

    def count(self, latent: int) -> int:
        """Firings of one latent, over all roles."""
        return sum(int(offsets[latent + 1]) - int(offsets[latent]) for offsets, _, _ in self._segments)

    def _corrupt(self, number: int, file: str, latent: int, found: str) -> CorruptError:
        path = self.folder / segment_folder(number) / file
        return CorruptError(f"{path}: latent {latent} has {found}; run `unmix verify` on the index")
