"""What every source of coders gives back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
