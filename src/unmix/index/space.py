"""How much disk an index will take, asked before much of it is written."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unmix.core.errors import MachineError
from unmix.index.frame import Taken
from unmix.index.plan import Plan

log = logging.getLogger("unmix")
POSTING = 6.0
"""Bytes of a posting in a segment, at most."""
IN_RUN = 8.0
"""Bytes of a posting in a shard."""
CLOSE = 0.8
"""Share of what is free above which a warning is given."""


@dataclass(frozen=True)
class Estimate:
    """What a build will need, from the L0 of the contexts seen so far."""

    tokens: int
    l0: dict[str, float]
    bytes: int
    """At the worst moment: segments, the shards not yet merged, and the token files twice."""


def l0_of(taken: Taken) -> dict[str, float]:
    """Firings a position of each coder in a batch."""
    positions = len(taken) * taken.context
    return {name: len(found.latents) / positions for name, found in taken.postings.items()}


def estimate(plan: Plan, l0: Mapping[str, float], workers: int = 1, parts: int | None = None) -> Estimate:
    """Bytes that the build needs; with `parts`, one part of so many, whose shards stay as they are."""
    tokens = plan.cut.n_contexts * plan.cut.context
    token_bytes = tokens * (plan.frame.token_dtype.itemsize + 4 + 1 / 8 + len(plan.frame.slices))
    postings = tokens * sum(l0.values())
    if parts is not None:
        return Estimate(tokens, dict(l0), int((token_bytes + IN_RUN * postings) / parts))
    waiting = min((plan.cut.group + workers) / plan.cut.n_shards, 1.0)
    return Estimate(tokens, dict(l0), int(2 * token_bytes + (POSTING + IN_RUN * waiting) * postings))


def check_space(building: Path, need: Estimate) -> None:
    """`MachineError` with both numbers where the disk cannot hold the build; a warning where it comes close."""
    written = _written(building)
    have = shutil.disk_usage(building).free + written
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in need.l0.items())
    said = f"{size(need.bytes)} for {need.tokens:,} tokens at L0 {rates}"
    if need.bytes > have:
        raise MachineError(f"{building.parent}: the index needs about {said}, but only {size(have)} are free")
    if need.bytes > CLOSE * have:
        log.warning("%s: the index needs about %s, and %s are free: that is close", building.parent, said, size(have))
    else:
        log.info("the index needs about %s; %s are free", said, size(have))


def _written(folder: Path) -> int:
    """Bytes below a folder in which other processes work: what they remove meanwhile does not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def size(n: float) -> str:
    """`1234567` → `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
