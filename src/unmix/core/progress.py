"""Progress on stderr: a live bar on a terminal, a line now and then elsewhere. Results never go here."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.progress import Progress

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
    """A task drawn as a bar of `rich`, which redraws itself."""

    def __init__(self, bar: Progress, name: str, total: float, unit: str, done: float = 0) -> None:
        super().__init__(name, total, unit, done, every=0.1)
        self._bar = bar
        self._id = bar.add_task(name, total=total, left=clock(0), note="")
        bar.update(self._id, completed=done)

    def _show(self) -> None:
        self._bar.update(self._id, completed=self.done, left=clock(self.left()), note=self._note)


@contextmanager
def task(name: str, total: float, unit: str = "tokens", done: float = 0) -> Generator[Task]:
    """Show progress of `name` towards `total` while inside."""
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        yield Task(name, total, unit, done)
        return
    stderr = sys.stderr
    with _live_bar() as bar, _logs_above(stderr):
        yield LiveTask(bar, name, total, unit, done)


def _live_bar() -> Progress:
    """A bar on stderr that is wiped when it is done. stdout goes through it only where that is a terminal too."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(24),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]} left"),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )


@contextmanager
def _logs_above(stderr: object) -> Generator[None]:
    """While a bar is drawn, log lines go through rich's stand-in for `stderr`, so that they land above the bar."""
    found = cast("list[logging.StreamHandler[Any]]", [h for h in log.handlers if isinstance(h, logging.StreamHandler)])
    kept = [(handler, handler.stream) for handler in found if handler.stream is stderr]
    for handler, _ in kept:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in kept:
            handler.setStream(stream)


def clock(seconds: float) -> str:
    """`75` → `1:15`, `3700` → `1:01:40`."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
