"""The two shapes of a scorer. Each is a class made from its own config, `Scorer(config)`.

- direct: `score(latent, explanation) -> Figures`, computed here and now;
- asking: `ask(latent, explanation) -> Question`, answered by a language model.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from unmix.core.config import Config
from unmix.explain.results import Draft, Figures, Question
from unmix.explain.windows import LatentView


@runtime_checkable
class DirectScorer(Protocol):
    """Needs the index only."""

    Config: ClassVar[type[Config]]
    config: Config
    figures: ClassVar[tuple[str, ...]]
    """Names of its figures, the one that speaks for it first."""

    def takes(self, explanation: Draft) -> bool:
        """Whether it can score such an explanation at all."""
        ...

    def score(self, latent: LatentView, explanation: Draft) -> Figures:
        """The score; `LatentError` where it cannot be told."""
        ...


@runtime_checkable
class AskingScorer(Protocol):
    """Needs a language model."""

    Config: ClassVar[type[Config]]
    config: Config
    figures: ClassVar[tuple[str, ...]]

    def takes(self, explanation: Draft) -> bool:
        """Whether it can score such an explanation at all."""
        ...

    def ask(self, latent: LatentView, explanation: Draft) -> Question:
        """What to ask, and how to read the replies; `LatentError` where there are too few windows."""
        ...


Scorer = DirectScorer | AskingScorer
