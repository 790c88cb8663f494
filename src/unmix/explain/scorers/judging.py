"""What detection and fuzzing share: batches of numbered texts, yes or no for each, and the figures of a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from pydantic import PositiveInt

from unmix.core.config import Config
from unmix.explain.clients.calls import Request, Sampling
from unmix.explain.excerpts import numbered, read_json
from unmix.explain.measures import confusion
from unmix.explain.prompts import Prompt
from unmix.explain.results import Figures, Question

FIGURES = ("balanced_accuracy", "f1", "precision", "recall", "accuracy")
LEAST = 4
"""Fewest windows of either kind from which a score is formed."""
_WORDS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}


class JudgeConfig(Config):
    """What the judge sees."""

    windows: PositiveInt = 20
    """Of each kind: right and wrong."""
    context: tuple[int, int] = (16, 15)
    batch: PositiveInt = 10
    """Texts in one request."""
    prompt: str
    sampling: Sampling = Sampling()
    seed: int = 0


def question(
    texts: Sequence[str], truth: Sequence[bool], explanation: str, prompt: Prompt, config: JudgeConfig, seed: int
) -> Question:
    """Texts in a seeded order, cut into batches; the reader wants exactly one answer for each text."""
    order: list[int] = np.random.default_rng(seed).permutation(len(texts)).tolist()
    batches = [order[i : i + config.batch] for i in range(0, len(order), config.batch)]
    requests = tuple(
        Request(
            prompt.system,
            prompt.fill(explanation=explanation, excerpts=numbered([texts[i] for i in batch]), count=str(len(batch))),
            config.sampling,
        )
        for batch in batches
    )

    def read(replies: Sequence[str]) -> Figures:
        said = np.zeros(len(texts), bool)
        for batch, reply in zip(batches, replies, strict=True):
            said[batch] = read_answers(reply, len(batch))
        return judged(np.array(truth, bool), said)

    return Question(requests, read)


def judged(truth: np.ndarray, said: np.ndarray) -> Figures:
    """Balanced accuracy, F1, precision, recall and accuracy of answers; texts weigh the same."""
    counts = confusion(truth, said)
    return Figures(
        {name: getattr(counts, name) for name in FIGURES},
        {"true": truth.astype(int).tolist(), "said": said.astype(int).tolist()},
    )


def read_answers(reply: str, n: int) -> list[bool]:
    """`n` answers from `{"answers": [1, 0, …]}` or a bare list; `LatentError` for any other count or value."""

    def wanted(value: Any) -> list[bool] | None:
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get("answers")
        if not isinstance(value, list):
            return None
        answers = [_WORDS.get(str(item).strip().casefold()) for item in cast("list[Any]", value)]
        if len(answers) != n or any(answer is None for answer in answers):
            return None
        return [bool(answer) for answer in answers]

    return cast("list[bool]", read_json(reply, wanted))
