"""`fuzzing`: a judge reads windows with marks and says for each whether the right tokens are marked (2410.13928).

Right and wrong texts are both windows in which the latent fires; in the wrong ones as many silent tokens are marked.
So the topic of a window tells nothing: only the tokens do.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from unmix.core.config import Config
from unmix.core.seeds import derive
from unmix.explain.excerpts import marked_text, window_strings
from unmix.explain.prompts import load_prompt
from unmix.explain.results import Draft, LatentError, Question
from unmix.explain.scorers.judging import FIGURES, LEAST, JudgeConfig, question
from unmix.explain.windows import LatentView
from unmix.index.windows import Window


class FuzzingConfig(JudgeConfig):
    """As every judge's."""

    prompt: str = "fuzzing.v1"


class FuzzingScorer:
    """Half of the windows with right marks, half with wrong ones."""

    Config: ClassVar[type[Config]] = FuzzingConfig
    figures: ClassVar[tuple[str, ...]] = FIGURES

    def __init__(self, config: FuzzingConfig) -> None:
        self.config = config
        self.prompt = load_prompt(config.prompt)

    def takes(self, explanation: Draft) -> bool:
        """Every explanation has a text."""
        return bool(explanation.text)

    def ask(self, latent: LatentView, explanation: Draft) -> Question:
        """Questions over windows. `LatentError` `TooFewWindows` below four of either kind."""
        config = self.config
        rng = np.random.default_rng(derive(config.seed, "fuzzing", latent.id))
        windows = latent.windows("quantiles", 2 * config.windows, config.context, centred=False, seed=config.seed)
        roomy = [w for w in windows if 2 * np.count_nonzero(w.values) <= len(w.values)]
        half = len(roomy) // 2
        if half < LEAST:
            raise LatentError(
                "TooFewWindows",
                f"latent {latent.id}: {len(roomy)} windows in which it fires on at most half of the tokens, "
                f"expected {2 * LEAST}",
            )
        order = rng.permutation(len(roomy))
        right, wrong = order[:half], order[half : 2 * half]
        texts = [marked_text(window_strings(roomy[i], latent.view), roomy[i].values != 0) for i in right]
        texts += [marked_text(window_strings(roomy[i], latent.view), wrong_marks(roomy[i], rng)) for i in wrong]
        truth = [True] * half + [False] * half
        seed = derive(config.seed, "order", latent.id)
        return question(texts, truth, explanation.text, self.prompt, config, seed)


def wrong_marks(window: Window, rng: np.random.Generator) -> np.ndarray:
    """As many marks as the window has firings, all on silent tokens."""
    silent = np.flatnonzero(window.values == 0)
    marks = np.zeros(len(window.values), bool)
    marks[rng.choice(silent, np.count_nonzero(window.values), replace=False)] = True
    return marks
