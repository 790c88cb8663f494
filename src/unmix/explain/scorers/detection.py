"""`detection`: a judge reads windows without marks and says for each whether the latent fires in it (2410.13928)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from unmix.core.config import Config
from unmix.core.seeds import derive
from unmix.explain.excerpts import marked_text, window_strings
from unmix.explain.grids import spread
from unmix.explain.prompts import load_prompt
from unmix.explain.results import Draft, LatentError, Question
from unmix.explain.scorers.judging import FIGURES, LEAST, JudgeConfig, question
from unmix.explain.windows import LatentView


class DetectionConfig(JudgeConfig):
    """As every judge's."""

    prompt: str = "detection.v1"


class DetectionScorer:
    """As many windows with firings (over all strengths) as without any; tiles, so that the place gives nothing away."""

    Config: ClassVar[type[Config]] = DetectionConfig
    figures: ClassVar[tuple[str, ...]] = FIGURES

    def __init__(self, config: DetectionConfig) -> None:
        self.config = config
        self.prompt = load_prompt(config.prompt)

    def takes(self, explanation: Draft) -> bool:
        """Every explanation has a text."""
        return bool(explanation.text)

    def ask(self, latent: LatentView, explanation: Draft) -> Question:
        """Questions over windows. `LatentError` `TooFewWindows` below four of either kind."""
        config = self.config
        firing = latent.windows("quantiles", config.windows, config.context, centred=False, seed=config.seed)
        silent = latent.negatives(min(config.windows, len(firing)), config.context, centred=False, seed=config.seed)
        firing = [firing[i] for i in spread(np.arange(len(firing)), len(silent))]
        if min(len(firing), len(silent)) < LEAST:
            raise LatentError(
                "TooFewWindows",
                f"latent {latent.id}: {len(firing)} windows with and {len(silent)} without firings to score on, "
                f"expected {LEAST} of each",
            )
        texts = [marked_text(window_strings(window, latent.view)) for window in [*firing, *silent]]
        truth = [True] * len(firing) + [False] * len(silent)
        seed = derive(config.seed, "detection", latent.id)
        return question(texts, truth, explanation.text, self.prompt, config, seed)
