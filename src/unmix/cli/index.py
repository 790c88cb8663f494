"""`unmix index`: build a latent index, or look at, join, mend and exchange finished ones."""

from __future__ import annotations

import importlib

from unmix.cli._run import run_until

SUBCOMMANDS = ("stats",)
"""Each lives in `cli/_index_NAME.py` and is a function `command(arguments) -> int`, as every command."""


def command(arguments: list[str]) -> int:
    """A subcommand, or a run file up to the index."""
    if arguments and arguments[0] in SUBCOMMANDS:
        return int(importlib.import_module(f"unmix.cli._index_{arguments[0]}").command(arguments[1:]))
    return run_until("index", arguments)
