"""Weights & Biases. The key is `WANDB_API_KEY`, of the environment or of `.env`; offline runs need none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmix.core.errors import MachineError, missing_extra
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
        """As an artifact of type `coder`."""
        artifact = self._library.Artifact(name, type="coder")
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def start(session: Session) -> Wandb:
    """`MachineError` where the library is missing, or an online run has no key."""
    try:
        library: Any = importlib.import_module("wandb")
    except ImportError:
        raise missing_extra("wandb", "wandb", "tracker wandb") from None
    if not session.tracking.offline:
        key = secret("WANDB_API_KEY")
        if key is not None:
            library.login(key=key)
        elif library.api.api_key is None:
            raise MachineError(
                "tracker wandb: no key in WANDB_API_KEY or .env; set one, or --train.tracking.offline true"
            )
    return Wandb(library, session)
