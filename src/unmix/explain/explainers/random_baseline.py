"""`random:SOURCE`: gives each latent the explanation of another one, the floor that every score is read against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from unmix.core.config import Config
from unmix.core.seeds import derive


class RandomConfig(Config):
    """Whose explanations are dealt out."""

    source: str = "ngram"
    """The explainer whose explanations are given to the wrong latents."""
    seed: int = 0


class RandomExplainer:
    """One cycle through all explained latents (Sattolo's), so that nobody gets their own."""

    Config: ClassVar[type[Config]] = RandomConfig

    def __init__(self, config: RandomConfig) -> None:
        self.config = config

    def pair(self, latents: Sequence[int]) -> dict[int, int]:
        """For each latent another one; depends on the set of latents and the seed. Empty for fewer than two."""
        ordered = sorted(set(latents))
        if len(ordered) < 2:
            return {}
        rng = np.random.default_rng(derive(self.config.seed, "derangement"))
        cycle = rng.permutation(np.array(ordered, np.int64))
        return {int(a): int(b) for a, b in zip(cycle, np.roll(cycle, -1))}
