"""Trackio: Weights & Biases' calls, kept in a local database."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmix.core.errors import missing_extra
from unmix.train.config import Tracking
from unmix.train.trackers import Session


class Trackio:
    """One run of a local project."""

    def __init__(self, library: Any, session: Session) -> None:
        self._library = library
        library.init(project=session.tracking.project, name=session.name, config=dict(session.settings), resume="allow")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step."""
        self._library.log(dict(figures), step=step)

    def upload(self, name: str, folder: Path) -> None:
        """Nothing: it keeps figures alone."""

    def finish(self) -> None:
        """Close the run."""
        self._library.finish()


def require(tracking: Tracking) -> Any:
    """The library; `MachineError` where it is missing."""
    try:
        library: Any = importlib.import_module("trackio")
    except ImportError:
        raise missing_extra("trackio", "trackio", "tracker trackio") from None
    return library


def start(session: Session) -> Trackio:
    """`MachineError` where the library is missing."""
    return Trackio(require(session.tracking), session)
