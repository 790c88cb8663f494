"""Random postings as plain lists, the same as segments on disk, and the store's answers worked out the plain way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unmix.index.layout import CoderEntry, IndexMeta, Segment, segment_folder
from unmix.index.part import Part
from unmix.index.segment import SegmentWriter
from unmix.index.store import PostingStore

Row = tuple[np.ndarray, np.ndarray]


def make_rows(seed: int, tokens: int, shares: Sequence[float], ties: float = 0.3) -> list[Row]:
    """Of latents that fire on these shares of the positions: positions, ascending, and values; some signed."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for share in shares:
        positions = np.flatnonzero(rng.random(tokens) < share)
        values = rng.lognormal(0, 2, len(positions)) * 10.0 ** rng.uniform(-6, 6)
        values = np.where(rng.random(len(values)) < ties, np.median(values) if len(values) else 0, values)
        if rng.random() < 0.5:
            values *= rng.choice([-1, 1], len(values))
        rows.append((positions, values.astype(np.float32)))
    return rows


def as_part(rows: Sequence[Row], begin: int = 0, end: int = 2**62) -> Part:
    """Rows as a part, cut to positions `[begin, end)`."""
    kept = [(p[(p >= begin) & (p < end)], v[(p >= begin) & (p < end)]) for p, v in rows]
    return Part(
        np.array([len(p) for p, _ in kept], np.int64),
        np.concatenate([np.empty(0, np.int64), *(p for p, _ in kept)]),
        np.concatenate([np.empty(0, np.float32), *(v for _, v in kept)]),
    )


def make_store(folder: Path, rows: Sequence[Row], lengths: Sequence[int], context: int) -> PostingStore:
    """The rows as an open store with segments of these lengths (multiples of the context)."""
    bases = np.cumsum([0, *lengths]).tolist()
    segments = tuple(Segment(base, length) for base, length in zip(bases, lengths, strict=False))
    for i, segment in enumerate(segments):
        with SegmentWriter(folder / "c" / segment_folder(i), segment.base, segment.tokens, len(rows)) as writer:
            part = as_part(rows, segment.base, segment.base + segment.tokens)
            writer.write(0, part)
    tokens, coders = bases[-1], {"c": CoderEntry("c", len(rows))}
    meta = IndexMeta(("only",), context, tokens // context, "uint16", (tokens,), coders, segments, {})
    return PostingStore(folder, meta, meta.coders["c"])


def within(row: Row, contexts: np.ndarray, context: int) -> Row:
    """`PostingStore.within` by looking at everything."""
    positions, values = row
    keep = np.isin(positions // context, contexts)
    return positions[keep], values[keep]


def strongest(row: Row, at_least: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """`PostingStore.strongest` by looking at everything."""
    positions, values = row
    if len(positions) <= at_least:
        return positions, values, np.float32(0)
    strength = np.abs(values)
    floor = np.partition(strength, -at_least)[-at_least] if at_least else np.float32(np.inf)
    keep = strength >= floor
    return positions[keep], values[keep], np.float32(floor)
