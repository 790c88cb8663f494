"""`unmix run`: every stage of a run file."""

from __future__ import annotations

from unmix.cli._run import run_until


def command(arguments: list[str]) -> int:
    """Walk the whole run."""
    return run_until(None, arguments)
