"""Timing on a noisy machine: contestants take turns in a shuffled order, ratios are formed inside a round.

A round runs every contestant once. Noise that lasts longer than a round moves all of them alike, so the ratio of two
contestants within one round is steadier than either time, and the median over rounds is steadier than the mean.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])

    def show(self, digits: int = 2, scale: float = 1.0) -> str:
        """`5.66 (5.50–5.81)`."""
        return f"{self.median * scale:.{digits}f} ({self.low * scale:.{digits}f}–{self.high * scale:.{digits}f})"


Times = dict[str, list[float]]


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1, seed: int = 0) -> Times:
    """Seconds of every contestant in every round; each callable runs once and returns how long it took.

    Warm-up rounds run too and are thrown away.
    """
    generator = random.Random(seed)
    names = list(contestants)
    times: Times = {name: [] for name in names}
    for turn in range(warmup + rounds):
        generator.shuffle(names)
        for name in names:
            seconds = contestants[name]()
            if turn >= warmup:
                times[name].append(seconds)
    return times


def speedup(times: Times, name: str, base: str) -> Spread:
    """How many times faster `name` is than `base`, round by round."""
    return Spread.of([slow / fast for fast, slow in zip(times[name], times[base], strict=True)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def machine() -> str:
    """One line on what the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
