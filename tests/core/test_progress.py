"""Progress: silent lines off a terminal, a bar on one."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from unmix.core import progress
from unmix.core.progress import LiveTask, Task, clock, log, task


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """`progress` sees this clock only."""
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


@pytest.fixture
def handler() -> Iterator[logging.StreamHandler[io.StringIO]]:
    """A handler such as the command line's, at level INFO."""
    made = logging.StreamHandler(io.StringIO())
    level = log.level
    log.addHandler(made)
    log.setLevel(logging.INFO)
    yield made
    log.removeHandler(made)
    log.setLevel(level)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal that a test puts in the place of stderr (pytest puts its own there between fixtures and test)."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_off_a_terminal_only_log_lines_appear(
    time: Clock, handler: logging.StreamHandler[io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line every 15 seconds, with share, counts, time left and the latest figures."""
    with task("train", 1000) as bar:
        assert type(bar) is Task
        bar.advance(100, "fvu 0.5")
        time.now += 14
        bar.advance(100)
        assert handler.stream.getvalue() == ""
        time.now += 2
        bar.advance(50)
        time.now += 1
        bar.advance(50, "fvu 0.4")
    assert handler.stream.getvalue() == "train  25% (250 of 1,000 tokens, 0:48 left) | fvu 0.5\n"
    assert capsys.readouterr() == ("", "")


def test_time_left_counts_from_where_this_process_began(time: Clock) -> None:
    """A resumed task does not take credit for what an earlier process did."""
    bar = Task("train", 100, "tokens", done=50)
    assert bar.left() == 0.0
    time.now += 10
    bar.advance(10)
    assert bar.left() == 40.0
    bar.advance(90)
    assert bar.left() == 0.0


def test_an_empty_task_is_done(time: Clock, handler: logging.StreamHandler[io.StringIO]) -> None:
    """Nothing to do is not a division by zero."""
    with task("verify", 0, unit="folders") as bar:
        time.now += 20
        bar.advance(0)
    assert handler.stream.getvalue() == "verify 100% (0 of 0 folders, 0:00 left)\n"


def test_on_a_terminal_a_bar_is_drawn_and_wiped(
    terminal: Terminal, handler: logging.StreamHandler[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log lines land above it, figures are shown as they are (brackets too), and nothing stays behind."""
    monkeypatch.setattr(sys, "stderr", terminal)
    handler.setStream(terminal)
    with task("train", 100, done=20) as bar:
        assert isinstance(bar, LiveTask)
        bar._last = 0.0
        bar.advance(30, "fvu [bold]")
        log.info("a line [bold]")
        assert handler.stream is not terminal
    assert handler.stream is terminal
    shown = terminal.getvalue()
    assert all(part in shown for part in ("train", " 50%", "fvu [bold]", "a line [bold]\n"))
    assert shown.endswith("\x1b[2K")
    log.info("after")
    assert terminal.getvalue().endswith("after\n")


def test_results_do_not_go_through_the_bar(
    terminal: Terminal, handler: logging.StreamHandler[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """stdout that is piped away gets its bytes while a bar is drawn."""
    monkeypatch.setattr(sys, "stderr", terminal)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with task("verify", 2):
        sys.stdout.write("whole  x\n")
        assert sys.stdout is out
    assert out.getvalue() == "whole  x\n"
    assert "whole" not in terminal.getvalue()


def test_quiet_draws_nothing(
    terminal: Terminal, handler: logging.StreamHandler[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--quiet` raises the level; a terminal alone is no reason to draw."""
    monkeypatch.setattr(sys, "stderr", terminal)
    log.setLevel(logging.WARNING)
    with task("train", 100) as bar:
        bar.advance(50)
    assert terminal.getvalue() == ""


def test_the_bar_is_wiped_after_an_exception(
    terminal: Terminal, handler: logging.StreamHandler[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error message starts on a clean line, the cursor is back."""
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(KeyError), task("train", 100):
        raise KeyError
    assert terminal.getvalue().endswith("\x1b[2K")
    assert "\x1b[?25h" in terminal.getvalue()
    assert sys.stderr is terminal


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (59.9, "0:59")])
def test_clock(seconds: float, text: str) -> None:
    """Minutes and seconds, hours where there are any."""
    assert clock(seconds) == text
