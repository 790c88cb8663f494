"""`unmix index stats`: figures of an index."""

from __future__ import annotations

import json
import sys

from unmix.core.errors import ConfigError


def command(arguments: list[str]) -> int:
    """Print the summary of an index as JSON."""
    if len(arguments) != 1:
        raise ConfigError("usage: unmix index stats FOLDER")
    from unmix.index import open_index, stats

    sys.stdout.write(json.dumps(stats(open_index(arguments[0])), indent=2) + "\n")
    return 0
