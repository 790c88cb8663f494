"""TensorBoard's event files, in `training/tensorboard/`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmix.core.errors import missing_extra
from unmix.train.config import Tracking
from unmix.train.trackers import Session


class TensorBoard:
    """One folder of event files."""

    def __init__(self, library: Any, session: Session) -> None:
        self._writer: Any = library.SummaryWriter(log_dir=str(session.folder / "tensorboard"))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def upload(self, name: str, folder: Path) -> None:
        """Nothing: it keeps figures alone."""

    def finish(self) -> None:
        """Write what is left."""
        self._writer.close()


def require(tracking: Tracking) -> Any:
    """The library; `MachineError` where it is missing."""
    try:
        library: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise missing_extra("tensorboard", "tensorboard", "tracker tensorboard") from None
    return library


def start(session: Session) -> TensorBoard:
    """`MachineError` where the library is missing."""
    return TensorBoard(require(session.tracking), session)
