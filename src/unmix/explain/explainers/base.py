"""The three shapes of an explainer. Each is a class made from its own config, `Explainer(config)`.

- direct: `explain(latent) -> Draft`, computed here and now;
- asking: `ask(latent) -> Question`, answered by a language model;
- borrowing: `pair(latents) -> {latent: the latent whose explanation it is given}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from unmix.core.config import Config
from unmix.explain.results import Draft, Question
from unmix.explain.windows import LatentView


@runtime_checkable
class DirectExplainer(Protocol):
    """Needs the index only."""

    Config: ClassVar[type[Config]]
    config: Config

    def explain(self, latent: LatentView) -> Draft:
        """The explanation of one latent; `LatentError` where there is none to give."""
        ...


@runtime_checkable
class AskingExplainer(Protocol):
    """Needs a language model."""

    Config: ClassVar[type[Config]]
    config: Config

    def ask(self, latent: LatentView) -> Question:
        """What to ask about one latent, and how to read the reply; `LatentError` where there is nothing to show."""
        ...


@runtime_checkable
class BorrowingExplainer(Protocol):
    """Gives latents the explanations of others."""

    Config: ClassVar[type[Config]]
    config: Config

    def pair(self, latents: Sequence[int]) -> dict[int, int]:
        """For each of the explained latents, another one of them."""
        ...


Explainer = DirectExplainer | AskingExplainer | BorrowingExplainer
