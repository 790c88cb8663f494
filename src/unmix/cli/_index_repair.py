"""`unmix index repair`: rebuilds what `unmix verify` finds broken in an index, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmix.index.sources.base import Source

USAGE = """usage: unmix index repair INDEX

Statistics are derived from the postings; broken segments and token files come from the model, coders and data that
the index was built of, as it remembers them, and only their shards are run again. What is put back has the hash that
it had before; where it has not, the index is left as it was.
"""


def command(arguments: list[str]) -> int:
    """Repair, and say what was broken."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    from unmix.core.errors import ConfigError

    if len(arguments) != 1:
        raise ConfigError("usage: unmix index repair INDEX")
    from unmix.cli._index_place import require_index
    from unmix.index.repairing import repair

    folder = require_index(arguments[0])
    for line in (found := repair(folder, lambda: _source(folder))):
        sys.stdout.write(f"repaired  {line}\n")
    if not found:
        sys.stdout.write(f"whole     {folder}\n")
    return 0


def _source(folder: Path) -> Source:
    """The source, opened again from what the index says of it."""
    from unmix.core.errors import ConfigError
    from unmix.index.layout import IndexMeta
    from unmix.index.sources.reopen import reopen

    rebuild = IndexMeta.read(folder).meta.get("rebuild")
    if not isinstance(rebuild, dict):
        raise ConfigError(
            f"{folder}: does not say how its source is opened again (it was built by user code): call "
            "unmix.index.repairing.repair(folder, open_source)"
        )
    return reopen(rebuild, folder)()
