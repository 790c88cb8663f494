"""What explainers and scorers hand back: a draft, a question for an LLM, or a failure that stays a failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmix.core.errors import UnmixError
from unmix.explain.clients.calls import Request


class LatentError(UnmixError):
    """One latent that could not be explained or scored. It becomes a failed row: never text, never a score."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        """Class of the failure: `NoFirings`, `NoPattern`, `BadReply`, …"""


@dataclass(frozen=True)
class Draft:
    """An explanation: one line for people, and what machines need to run it again."""

    text: str
    data: dict[str, Any] = field(default_factory=lambda: {})
    """Plain JSON; `data["pattern"]` where the explanation can be run (see `patterns.Pattern`)."""


@dataclass(frozen=True)
class Figures:
    """A score: named numbers, None where one is undefined, and what they were counted on."""

    values: dict[str, float | None]
    counted: dict[str, Any] = field(default_factory=lambda: {})
    """Plain JSON: sample sizes, weights, per-window answers."""


@dataclass(frozen=True)
class Question:
    """Requests for an LLM and how its replies are read; `read` raises `LatentError` for replies that say nothing."""

    requests: tuple[Request, ...]
    read: Callable[[Sequence[str]], Draft | Figures]
