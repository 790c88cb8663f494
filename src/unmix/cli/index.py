"""`unmix index`: a run file up to the latent index; `unmix index stats FOLDER` shows figures of one."""

from __future__ import annotations

import json
import sys

from unmix.cli._run import run_until
from unmix.core.errors import ConfigError


def command(arguments: list[str]) -> int:
    """Build, or show statistics."""
    if arguments and arguments[0] == "stats":
        if len(arguments) != 2:
            raise ConfigError("usage: unmix index stats FOLDER")
        from unmix.index import open_index, stats

        sys.stdout.write(json.dumps(stats(open_index(arguments[1])), indent=2) + "\n")
        return 0
    return run_until("index", arguments)
