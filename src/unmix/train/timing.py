"""Where wall time goes: seconds by what they were spent on."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

PARTS = {
    "model": "the model's forward passes",
    "wait": "waiting for data",
    "coder": "coder steps",
    "save": "log and checkpoints",
}
"""What is told apart, in the order of the summary."""
BEHIND = " (behind)"
"""Ends the names of what a thread of its own did meanwhile."""


class Clock:
    """Adds up seconds by name. What is counted inside something else counts there alone.

    Threads may share one: each has a stack of its own, and what another thread than the first counts is kept apart.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._home = threading.get_ident()
        self._inner = threading.local()

    @contextmanager
    def on(self, name: str) -> Generator[None]:
        """Count the time inside towards `name`, or towards `name (behind)` in another thread than the clock's own."""
        stack: list[float] = self._inner.__dict__.setdefault("stack", [])
        stack.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            own = spent - stack.pop()
            if stack:
                stack[-1] += spent
            self.add(name if threading.get_ident() == self._home else f"{name}{BEHIND}", own)

    def add(self, name: str, seconds: float) -> None:
        """Add to `name`."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def reset(self) -> None:
        """Forget the sums: what was spent before a loop is not part of it."""
        with self._lock:
            self._seconds.clear()

    def seconds(self) -> dict[str, float]:
        """A copy of the sums."""
        with self._lock:
            return dict(self._seconds)


def summary(total: float, seconds: Mapping[str, float]) -> str:
    """One line: shares of `total` seconds, and for how long the model ran meanwhile."""
    parts = [f"{words} {seconds[name] / total:.0%}" for name, words in PARTS.items() if seconds.get(name, 0.0) > 0]
    rest = 1 - sum(seconds.get(name, 0.0) for name in PARTS) / total
    behind = seconds.get(f"model{BEHIND}", 0.0)
    beside = f"; meanwhile the model ran {behind:.1f} s" if behind > 0 else ""
    return f"{total:.1f} s: {', '.join([*parts, f'the rest {max(rest, 0.0):.0%}'])}{beside}"
