"""Weights & Biases. The key is `WANDB_API_KEY`, of the environment or of `.env`; offline runs need none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmix.core.errors import MachineError, ServiceError, missing_extra
from unmix.train.config import Tracking
from unmix.train.trackers import Session, secret


class Wandb:
    """One run there."""

    def __init__(self, library: Any, session: Session) -> None:
        self._library, self._session = library, session
        session.folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = library.init(
            project=session.tracking.project,
            name=session.name,
            id=session.id,
            resume="allow",
            dir=str(session.folder),
            config=dict(session.settings),
            mode="offline" if session.tracking.offline else "online",
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step."""
        self._run.log(dict(figures), step=step)

    def upload(self, name: str, folder: Path) -> None:
        """As an artifact of type `coder`, with the training's settings. `ServiceError` where it is not taken."""
        try:
            artifact = self._library.Artifact(name, type="coder", metadata=dict(self._session.settings))
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)
        except Exception as error:
            # The library has no class of its own for all that can go wrong on the way.
            raise ServiceError(
                f"tracker wandb: did not take the artifact {name} ({type(error).__name__}: {error}); the coder is "
                f"whole in {folder}"
            ) from error

    def finish(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def require(tracking: Tracking) -> Any:
    """The library. `MachineError` where it is missing, or an online run has no key."""
    try:
        library: Any = importlib.import_module("wandb")
    except ImportError:
        raise missing_extra("wandb", "wandb", "tracker wandb") from None
    if not tracking.offline and secret("WANDB_API_KEY") is None and library.api.api_key is None:
        raise MachineError("tracker wandb: no key in WANDB_API_KEY or .env; set one, or --train.tracking.offline true")
    return library


def start(session: Session) -> Wandb:
    """Raises as `require`."""
    library = require(session.tracking)
    key = secret("WANDB_API_KEY")
    if not session.tracking.offline and key is not None:
        library.login(key=key)
    return Wandb(library, session)
