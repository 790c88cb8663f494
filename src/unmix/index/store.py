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
    ROLE_BYTES,
    TOKENS,
    CoderEntry,
    IndexMeta,
    RoleFilter,
    open_raw,
    role_ids,
    segment_folder,
    slice_file,
)
from unmix.index.part import Part, interleave
from unmix.index.reading import Rows, places, read_rows
from unmix.index.segment import SegmentReader


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
        return token_strings(self.vocab, ids)


def token_strings(vocab: list[str] | None, ids: Integer[np.ndarray, " n"] | Sequence[int]) -> list[str] | None:
    """Display strings of token ids by a vocabulary, if there is one; an id past it shows as `<id>`."""
    if vocab is None:
        return None
    size, numbers = len(vocab), ids.tolist() if isinstance(ids, np.ndarray) else ids
    return [vocab[i] if 0 <= i < size else f"<{i}>" for i in numbers]


class PostingStore:
    """One coder's segments, memory-mapped. Opening reads nothing but the end of each segment's offsets."""

    def __init__(self, folder: Path, meta: IndexMeta, entry: CoderEntry) -> None:
        self.folder, self.meta, self.n_latents = folder / entry.folder, meta, entry.n_latents
        self._segments = [
            SegmentReader(self.folder / segment_folder(i), segment.base, segment.tokens, entry.n_latents)
            for i, segment in enumerate(meta.segments)
        ]

    @cached_property
    def scale(self) -> Float32[np.ndarray, " latents"]:
        """max |value| of each latent, exact; 0 where it never fires."""
        scale = np.zeros(self.n_latents, np.float32)
        for segment in self._segments:
            np.maximum(scale, segment.maxima, out=scale)
        scale.flags.writeable = False
        return scale

    @cached_property
    def counts(self) -> Int64[np.ndarray, " latents"]:
        """Firings of each latent, over all roles."""
        counts = np.zeros(self.n_latents, np.int64)
        for segment in self._segments:
            counts += segment.counts()
        counts.flags.writeable = False
        return counts

    def count(self, latent: int) -> int:
        """Firings of one latent, over all roles."""
        return sum(segment.row(latent).count for segment in self._segments)

    def read(self, latent: int) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Global positions, ascending, and values of one latent: one contiguous read for each segment.

        Raises `CorruptError` naming the file where they cannot be what was written.
        """
        rows = Rows.of(self._segments, latent)
        return rows.read(rows.whole())

    def within(
        self, latent: int, contexts: Int64[np.ndarray, " contexts"]
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Positions, ascending, and values of the firings inside some contexts (ids, ascending).

        Only blocks that reach into one of them are decoded.
        """
        rows = Rows.of(self._segments, latent)
        begins = contexts * self.meta.context
        ends = begins + self.meta.context
        positions, values = rows.read(rows.reaching(begins, ends))
        first, last = np.searchsorted(positions, begins), np.searchsorted(positions, ends)
        keep = places(first, last - first)
        return positions[keep], values[keep]

    def strongest(
        self, latent: int, at_least: int
    ) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"], np.float32]:
        """`(positions, values, floor)`: every firing with `|value| >= floor`, positions ascending.

        At least `at_least` of them; where the latent has no more than that, all of them and a floor of 0. Only
        blocks whose maximum reaches the `at_least`-th largest block maximum are decoded.
        """
        rows = Rows.of(self._segments, latent)
        if rows.count <= at_least:
            return *rows.read(rows.whole()), np.float32(0)
        if at_least < 1:
            return np.empty(0, np.int64), np.empty(0, np.float32), np.float32(np.inf)
        positions, values = rows.read(rows.peaking(at_least))
        strength = np.abs(values)
        floor = np.partition(strength, -at_least)[-at_least]
        keep = strength >= floor
        return positions[keep], values[keep], np.float32(floor)

    def part(self, first: int, last: int) -> Part:
        """Every posting of latents `[first, last)`, latent by latent, positions global and ascending."""
        whole = np.zeros(last - first, np.float32)
        for segment in self._segments:
            np.maximum(whole, segment.maxima[first:last], out=whole)
        return interleave([read_rows(segment, first, last, whole) for segment in self._segments])
