"""`unmix index merge`: one index of the parts of a build, or of indexes over different text."""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = """usage: unmix index merge OUT PART [PART …]

Joins into the index OUT either
  - the parts of one build, made with --shard i/n: give what --out said of each (or the folder .NAME.building);
    they may come from several machines, and shards that none of them has are named; or
  - finished indexes of the same coders over different text: documents are numbered on, statistics derived anew.
The parts stay as they are.
"""


def command(arguments: list[str]) -> int:
    """Join, and say what the index holds."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    from unmix.core.errors import ConfigError

    if len(arguments) < 2:
        raise ConfigError("usage: unmix index merge OUT PART [PART …]")
    for word in arguments:
        if word.startswith("--"):
            raise ConfigError(f"unknown option {word}. unmix index merge takes folders alone")
    places = [Path(part).resolve() for part in arguments[1:]]
    for part, place in zip(arguments[1:], places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{part}: is named twice; its text would count twice")
        if not place.is_dir() and not (place.parent / f".{place.name}.building").is_dir():
            raise ConfigError(f"{part}: no such folder")
    from unmix.cli._index_place import refuse_index
    from unmix.index.joining import join

    refuse_index(arguments[0])
    index = join(Path(arguments[0]), arguments[1:])
    sys.stdout.write(f"{index.folder}: {index.n_tokens:,} tokens, coders {', '.join(index.names)}\n")
    return 0
