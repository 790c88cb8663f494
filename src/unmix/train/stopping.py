"""Ctrl-C and SIGTERM while a step is taken: the step is finished first, so that what is saved is whole."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("unmix")


@contextmanager
def deferred() -> Generator[Callable[[], bool]]:
    """Gives a question: was a stop asked for? A second request is not deferred. Outside the main thread: never."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # What is ignored or set by other than Python stays as it is: shells ignore Ctrl-C for background jobs.
    before = {number: handler for number, handler in before.items() if callable(handler)}

    def back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        back()
        log.info("stopping after this step; once more stops at once")

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        back()
