"""What every source of coders gives back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmix.core.errors import did_you_mean, nearest


@dataclass(frozen=True)
class Fetched:
    """A place on this machine, and where it came from."""

    path: Path
    """The folder or file that was asked for, on disk."""
    origin: dict[str, Any] = field(default_factory=dict[str, Any])
    """JSON-able provenance: `scheme` (local, hf, wandb, https, release), `place` as it was asked for, and per scheme
    `repo`, `revision` (the resolved commit), `path`, `url`, `sha256`; `release` holds the facts of a named release."""


def cache_folder(part: str) -> Path:
    """`$UNMIX_CACHE/<part>`, else `~/.cache/unmix/<part>`."""
    base = os.environ.get("UNMIX_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "unmix") / part


def suggest(word: str, options: Sequence[str], n: int = 12) -> str:
    """As `did_you_mean`, but where nothing is near, no more than the first `n` are listed."""
    if nearest(word, options) or len(options) <= n:
        return did_you_mean(word, options)
    return f"There are {', '.join(options[:n])} and {len(options) - n:,} more."
