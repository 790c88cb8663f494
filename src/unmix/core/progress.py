"""Progress on stderr: a live bar on a terminal, a line now and then elsewhere. Results never go here."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

log = logging.getLogger("unmix")


class Task:
    """One running count with a total; `advance` it, and optionally show figures beside it."""

    def __init__(self, name: str, total: float, unit: str, done: float = 0, every: float = 15.0) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._start = self._last = time.monotonic()
        self._from, self._every = done, every
        self._note = ""

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Add `amount` to the count; `note` replaces the figures shown."""
        self.done += amount
        self._note = self._note if note is None else note
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._show()

    def left(self) -> float:
        """Seconds left at the mean speed so far; 0 before anything was counted."""
        moved = self.done - self._from
        if moved <= 0:
            return 0.0
        return (time.monotonic() - self._start) / moved * max(self.total - self.done, 0)

    def _show(self) -> None:
        share = 100 * self.done / self.total if self.total else 100.0
        note = f" | {self._note}" if self._note else ""
        log.info(
            "%s %3.0f%% (%s of %s %s, %s left)%s",
            self.name, share, f"{self.done:,.0f}", f"{self.total:,.0f}", self.unit, clock(self.left()), note,
        )  # fmt: skip


class LiveTask(Task):
    """A task drawn as a bar that redraws itself."""

    def __init__(self, name: str, total: float, unit: str, done: float = 0) -> None:
        super().__init__(name, total, unit, done, every=0.2)

    def _show(self) -> None:
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        bar = "█" * int(share * 24) + "░" * (24 - int(share * 24))
        line = f"{self.name:<10} {bar} {share:4.0%}  {clock(self.left())} left  {self._note}"
        sys.stderr.write("\r\x1b[2K" + line[:118])
        sys.stderr.flush()


@contextmanager
def task(name: str, total: float, unit: str = "tokens", done: float = 0) -> Generator[Task]:
    """Show progress of `name` towards `total` while inside."""
    live = sys.stderr.isatty() and log.isEnabledFor(logging.INFO)
    current = LiveTask(name, total, unit, done) if live else Task(name, total, unit, done)
    try:
        yield current
    finally:
        if live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def clock(seconds: float) -> str:
    """`75` → `1:15`, `3700` → `1:01:40`."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
