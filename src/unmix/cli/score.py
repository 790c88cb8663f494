"""`unmix score`: a run file up to this stage."""

from __future__ import annotations

from unmix.cli._run import run_until


def command(arguments: list[str]) -> int:
    """Walk the run up to `score`."""
    return run_until("score", arguments)
