"""`llm`: shows windows to a language model and asks for one short phrase. A reply without one is a failure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
from pydantic import PositiveInt

from unmix.core.config import Config
from unmix.explain.clients.calls import Request, Sampling
from unmix.explain.excerpts import marked_text, numbered, read_json, window_strings
from unmix.explain.prompts import load_prompt
from unmix.explain.results import Draft, Question
from unmix.explain.windows import LatentView

LONGEST = 300
"""Characters above which a reply is an essay and no phrase."""
_PLACEHOLDERS = frozenset({"your phrase", "n/a", "none", "unknown"})


class LLMConfig(Config):
    """What is shown, how it is asked."""

    windows: PositiveInt = 16
    """Over all tenths of the latent's strength (2410.13928: better than the strongest ones only)."""
    context: tuple[int, int] = (20, 12)
    mark: float = 0.1
    """Tokens are marked from this share of the strongest activation shown."""
    prompt: str = "explain.v1"
    sampling: Sampling = Sampling()
    seed: int = 0


class LLMExplainer:
    """One request a latent."""

    Config: ClassVar[type[Config]] = LLMConfig

    def __init__(self, config: LLMConfig) -> None:
        self.config = config
        self.prompt = load_prompt(config.prompt)

    def ask(self, latent: LatentView) -> Question:
        """Windows with marks. `LatentError` `NoFirings` where there is nothing to show."""
        latent.require_firings()
        windows = latent.windows("quantiles", self.config.windows, self.config.context, seed=self.config.seed)
        least = self.config.mark * max(float(np.abs(window.values).max()) for window in windows)
        texts = [
            marked_text(window_strings(window, latent.view), np.abs(window.values) >= max(least, 1e-12))
            for window in windows
        ]
        user = self.prompt.fill(excerpts=numbered(texts))
        positions = [window.position for window in windows]
        return Question(
            (Request(self.prompt.system, user, self.config.sampling),),
            lambda replies: Draft(read_explanation(replies), {"windows": positions}),
        )


def read_explanation(replies: Sequence[str]) -> str:
    """The phrase in `{"explanation": "…"}`; `LatentError` `BadReply` for anything else, empty or far too long."""
    return str(read_json(replies[0], _phrase))


def _phrase(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    text = cast("dict[str, Any]", value).get("explanation")
    if not isinstance(text, str):
        return None
    text = " ".join(text.split())
    said = any(char.isalnum() for char in text) and text.casefold() not in _PLACEHOLDERS
    return text if said and len(text) <= LONGEST else None
