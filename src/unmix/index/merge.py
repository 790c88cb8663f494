"""The closing pass: spills of one coder → immutable segments, scales and statistics.

Latents are taken in runs of about a million postings, so memory stays bounded whatever the corpus; the one
exception is a single latent that fires more often than that, whose postings (about 100 bytes each here) are
held together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float16, Float32, Integer, UInt8

from unmix.core.atomic import disk_errors
from unmix.index.layout import OFFSETS, POSITIONS, SCALE, VALUES, Segment, save_raw, segment_folder, write_raw
from unmix.index.part import Part, interleave
from unmix.index.spill import Spill
from unmix.index.statistics import chunk_statistics, chunks, figure_paths

SMALLEST = np.float16(2**-24)


@dataclass(frozen=True)
class TokenTable:
    """What the merge needs of the tokens: ids `[n_tokens]` flat, role of each context."""

    tokens: Integer[np.ndarray, " n_tokens"]
    roles: UInt8[np.ndarray, " n_contexts"]
    context: int
    n_roles: int


@dataclass
class _SegmentFiles:
    base: int
    positions: BinaryIO
    values: BinaryIO
    offsets: np.ndarray

    def write(self, first: int, part: Part, relative: Float16[np.ndarray, " n"]) -> None:
        write_raw(self.positions, (part.positions - self.base).astype(np.uint32))
        write_raw(self.values, relative)
        last = first + len(part.counts)
        self.offsets[first + 1 : last + 1] = self.offsets[first] + np.cumsum(part.counts).astype(np.uint64)


def merge_coder(
    folder: Path, spills: Sequence[Spill], segments: Sequence[Segment], n_latents: int, table: TokenTable
) -> None:
    """Write one coder's folder from its spills. Every spill lies wholly in the segment that it names."""
    counts = np.zeros(n_latents, np.int64)
    for spill in spills:
        counts += np.diff(spill.offsets())
    scale = np.zeros(n_latents, np.float32)
    with disk_errors(folder), ExitStack() as stack:
        (folder / "statistics").mkdir(parents=True)
        stored = {name: stack.enter_context(path.open("wb")) for name, path in figure_paths(folder).items()}
        files = [_open_segment(folder / segment_folder(i), s, n_latents, stack) for i, s in enumerate(segments)]
        for first, last in chunks(counts):
            parts = [_gather(spills, i, first, last) for i in range(len(segments))]
            whole = interleave(parts)
            scale[first:last] = maxima(whole)
            for segment, part in zip(files, parts, strict=True):
                segment.write(first, part, to_half(part, scale[first:last]))
            for name, rows in _figures(whole, table).items():
                write_raw(stored[name], rows)
        for i, segment in enumerate(files):
            save_raw(folder / segment_folder(i) / OFFSETS, segment.offsets)
        save_raw(folder / SCALE, scale)


def _open_segment(folder: Path, segment: Segment, n_latents: int, stack: ExitStack) -> _SegmentFiles:
    folder.mkdir()
    positions = stack.enter_context((folder / POSITIONS).open("wb"))
    values = stack.enter_context((folder / VALUES).open("wb"))
    return _SegmentFiles(segment.base, positions, values, np.zeros(n_latents + 1, np.uint64))


def _gather(spills: Sequence[Spill], segment: int, first: int, last: int) -> Part:
    empty = Part(np.zeros(last - first, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return interleave([spill.part(first, last) for spill in spills if spill.segment == segment] or [empty])


def maxima(part: Part) -> Float32[np.ndarray, " latents"]:
    """max |value| of each latent; 0 where it never fires."""
    result = np.zeros(len(part.counts), np.float32)
    alive = np.flatnonzero(part.counts)
    if len(alive):
        starts = (np.cumsum(part.counts) - part.counts)[alive]
        result[alive] = np.maximum.reduceat(np.abs(part.values), starts)
    return result


def to_half(part: Part, scale: Float32[np.ndarray, " latents"]) -> Float16[np.ndarray, " n"]:
    """Values relative to their latent's scale, in float16.

    With v the value and s the scale, `|stored · s − v| ≤ 2^-11 |v| + 2^-24 s` (float16's mantissa, and its
    smallest step) and never above `2^-12 s`, but for float32's own rounding (2^-23 s). What would round to 0
    keeps its sign at the smallest step: a firing stays a firing.
    """
    with np.errstate(under="ignore"):
        ratio = part.values / np.repeat(scale, part.counts)
        half = ratio.astype(np.float16)
    lost = half == 0
    half[lost] = np.copysign(SMALLEST, part.values[lost])
    return half


def from_half(half: Float16[np.ndarray, " n"], scale: np.float32) -> Float32[np.ndarray, " n"]:
    """What `to_half` stored, as float32; never 0, even where the scale is subnormal."""
    with np.errstate(under="ignore"):
        values = half.astype(np.float32) * scale
    if scale < 2.0**-102:
        lost = values == 0
        values[lost] = np.copysign(np.float32(2.0**-149), half[lost])
    return values


def _figures(part: Part, table: TokenTable) -> dict[str, Any]:
    contexts, places = np.divmod(part.positions, table.context)
    return chunk_statistics(
        part.counts, part.values, places, table.tokens[part.positions], table.roles[contexts],
        table.context, table.n_roles,
    )  # fmt: skip
