"""`unmix index`: build a latent index, or look at, join, mend and exchange finished ones."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from unmix.cli._run import run_until
from unmix.core.errors import ConfigError, nearest

SUBCOMMANDS = {
    "stats": "figures, rankings and plots of an index",
    "merge": "join the parts that --shard built",
    "repair": "build the broken files of an index again, and nothing else",
    "export": "write an index as delphi's cache or as Parquet",
    "import": "read delphi's cache as an index",
}
"""Each lives in `cli/_index_NAME.py` and is a function `command(arguments) -> int`, as every command."""


def command(arguments: list[str]) -> int:
    """A subcommand, a build from flags, or a run file up to the index."""
    if not arguments or arguments[0] in ("-h", "--help"):
        from unmix.cli._index_build import usage

        sys.stdout.write(usage())
        return 0
    first = arguments[0]
    if first in SUBCOMMANDS:
        return int(importlib.import_module(f"unmix.cli._index_{first}").command(arguments[1:]))
    if first.startswith("--"):
        from unmix.cli._index_build import command as build

        return build(arguments)
    meant = nearest(first, SUBCOMMANDS, 1)
    if meant and not first.startswith("builtin:") and not Path(first).exists():
        raise ConfigError(f"{first}: no such run file, and no subcommand. Did you mean unmix index {meant[0]}?")
    return run_until("index", arguments)
