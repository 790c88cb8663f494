"""Trackers: where a training's figures go beside its own files; one small file each, loaded only when asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unmix.core.plugins import Registry
from unmix.train.config import Tracking


@dataclass(frozen=True)
class Session:
    """One training as a tracker sees it."""

    name: str
    """Shown to people."""
    id: str
    """The same for the same training, so that a resumed one goes on in its place."""
    folder: Path
    """Where a tracker may keep files."""
    settings: Mapping[str, Any]
    """Config of the training, JSON-able."""
    tracking: Tracking


class Tracker(Protocol):
    """Takes figures as they come."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step."""
        ...

    def upload(self, name: str, folder: Path) -> None:
        """Keep a finished coder's folder; nothing where the tracker has no place for files."""
        ...

    def finish(self) -> None:
        """Send what is left."""
        ...


TRACKERS = Registry(
    "unmix.trackers",
    "tracker",
    {
        "wandb": "unmix.train.trackers.wandb:start",
        "trackio": "unmix.train.trackers.trackio:start",
        "tensorboard": "unmix.train.trackers.tensorboard:start",
    },
)


def check_trackers(names: Sequence[str], tracking: Tracking) -> None:
    """Ask every tracker that is named whether it could start; nothing is sent. `MachineError` where it could not.

    A tracker's module says so in `require(tracking)`, if it has anything to say.
    """
    for name in names:
        require = getattr(sys.modules[TRACKERS.get(name).__module__], "require", None)
        if require is not None:
            require(tracking)


def start_trackers(names: Sequence[str], session: Session) -> list[Tracker]:
    """Every tracker that is named; `MachineError` with the extra's name where a library is missing."""
    return [TRACKERS.get(name)(session) for name in names]


def secret(name: str, folder: Path | None = None) -> str | None:
    """A key from the environment, or from the file `.env` in `folder` (default: here). Never logged or stored."""
    if os.environ.get(name):
        return os.environ[name]
    path = (folder or Path()) / ".env"
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and key.strip() == name:
            return value.strip().strip("'\"") or None
    return None
