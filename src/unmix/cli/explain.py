"""`unmix explain`: a run file up to this stage."""

from __future__ import annotations

from unmix.cli._run import run_until


def command(arguments: list[str]) -> int:
    """Walk the run up to `explain`."""
    return run_until("explain", arguments)
