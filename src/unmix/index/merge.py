"""Sorted runs of one coder over consecutive shards → one immutable segment, latents in spans of a million postings.

Memory stays bounded whatever the corpus; the one exception is a latent that fires more often than that inside one
segment, whose postings are held together: `plan.MOST_TOKENS` bounds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unmix.core.atomic import disk_errors
from unmix.index.layout import Segment
from unmix.index.part import Part
from unmix.index.runs import WOVEN, Run, spans, weave
from unmix.index.segment import SegmentWriter

BYTES_PER_POSTING = 128
"""Held in memory for each posting that is woven and packed."""


def merge_runs(folder: Path, segment: Segment, runs: Sequence[Run], n_latents: int, budget_bytes: int) -> None:
    """Write the segment's folder of all postings of the runs, which come in order of position."""
    writer = SegmentWriter(folder, segment.base, segment.tokens, n_latents)
    with disk_errors(folder), writer:
        if not runs:
            return
        whole = np.zeros(n_latents + 1, np.int64)
        for run in runs:
            whole += run.offsets()
        counts = np.diff(whole)
        at_once = min(max(budget_bytes // BYTES_PER_POSTING, 1), WOVEN)
        for first, last in spans(counts, len(runs), at_once):
            bounds = np.stack([run.starts(first, last) for run in runs])
            parts = [
                _local(run, segment.base, int(start), int(end))
                for run, start, end in zip(runs, bounds[:, 0], bounds[:, -1], strict=True)
            ]
            positions, values = weave(np.diff(bounds), parts)
            writer.write(first, Part(counts[first:last], positions.astype(np.int64) + segment.base, values))


def _local(run: Run, base: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Postings of a run, positions from `base` on, still in 32 bits."""
    positions, values = run.read(start, end)
    if run.base != base:
        positions += np.uint32(run.base - base)
    return positions, values
