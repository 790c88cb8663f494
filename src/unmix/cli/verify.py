"""`unmix verify`: recompute every hash below a place and name what is broken."""

from __future__ import annotations

import sys
from pathlib import Path

from unmix.core.errors import ConfigError, CorruptError
from unmix.core.manifest import MANIFEST, Problem, covered, verify_folder
from unmix.core.progress import task

USAGE = """usage: unmix verify PATH [PATH …]

Checks length and SHA-256 of every file that a manifest below PATH lists: coders, token shards, indexes, reports,
whole runs. Exit code 4 where one is broken.
"""


def command(arguments: list[str]) -> int:
    """Verify every manifest below each path; `CorruptError` lists the broken files."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    for word in arguments:
        if word.startswith("--"):
            raise ConfigError(f"unknown option {word}. unmix verify takes paths alone")
    broken: list[str] = []
    for place in arguments:
        folders = sorted(path.parent for path in Path(place).rglob(MANIFEST))
        if not folders:
            raise ConfigError(f"{place}: no {MANIFEST} there or below, so nothing to verify")
        done: set[Path] = set()
        with task("verify", len(folders), unit="folders") as bar:
            for folder in folders:
                if folder not in done:
                    found = verify_folder(folder)
                    done |= covered(folder)
                    broken += _said_of(folder, found)
                    sys.stdout.write(f"{'broken' if found else 'whole '}  {folder}\n")
                bar.advance(1)
    if broken:
        raise CorruptError(f"{len(broken)} broken: " + "; ".join(broken))
    return 0


def _said_of(folder: Path, problems: list[Problem]) -> list[str]:
    """What is broken; of an index by coder, segment, tokens and shards, and what mends it."""
    if not problems or not (folder / "index.json").is_file():
        return [str(problem) for problem in problems]
    from unmix.index.damage import shown

    return [f"{folder}: {line} (unmix index repair mends it)" for line in shown(folder, problems)]
