"""`pattern`: runs a runnable explanation on the scoring contexts, token by token.

What is measured on: where the index is small enough, every context of the role `score`. In a larger one, a uniform
sample of contexts, the same for all latents, and beside it contexts in which the latent fires; each context then
stands for as many as its stratum (fires in it / silent) has for each one looked at. So precision, recall and
correlation are those of the true firing rate, however rare the latent: windows drawn around firings alone would
make any broad pattern look precise.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import PositiveInt

from unmix.core.config import Config
from unmix.core.seeds import derive
from unmix.explain.grids import Grid
from unmix.explain.measures import confusion, pearson
from unmix.explain.patterns import Pattern
from unmix.explain.results import Draft, Figures
from unmix.explain.windows import LatentView


class PatternConfig(Config):
    """How much is looked at."""

    own: PositiveInt = 512
    """Contexts in which the latent fires, at most, where not every context is read."""
    seed: int = 0


class PatternScorer:
    """F1, precision and recall of "fires here", share of the activation found, correlation of activations."""

    Config: ClassVar[type[Config]] = PatternConfig
    figures: ClassVar[tuple[str, ...]] = ("f1", "pearson", "precision", "recall", "mass_recall")

    def __init__(self, config: PatternConfig) -> None:
        self.config = config

    def takes(self, explanation: Draft) -> bool:
        """Explanations that hold a pattern."""
        return "pattern" in explanation.data

    def score(self, latent: LatentView, explanation: Draft) -> Figures:
        """Figures over tokens. `LatentError` `NoFirings` where the latent never fires in the scoring contexts."""
        pattern = Pattern.from_json(explanation.data["pattern"])
        latent.require_firings()
        contexts, grid, weights = self.sample(latent)
        places, values = latent.firings(contexts, grid)
        hits, predicted = pattern.match(grid)
        # Places where neither side says anything are one weight, not millions of zeros.
        where = np.union1d(places, hits)
        true, said = np.zeros(len(where)), np.zeros(len(where))
        true[np.searchsorted(where, places)] = values
        said[np.searchsorted(where, hits)] = predicted
        fires, says = np.isin(where, places), np.isin(where, hits)
        weight = weights[where // grid.width]
        all_places = float((weights * grid.counts.reshape(grid.n_contexts, -1).sum(1)).sum())
        rest = max(all_places - float(weight.sum()), 0.0)
        counts = confusion(fires, says, weight)
        mass = weight * np.abs(true)
        return Figures(
            {
                "f1": counts.f1,
                "pearson": pearson(np.append(true, 0.0), np.append(said, 0.0), np.append(weight, rest)),
                "precision": counts.precision,
                "recall": counts.recall,
                "mass_recall": float(mass[says].sum() / mass.sum()),
            },
            {
                "contexts": grid.n_contexts,
                "tokens": grid.trials,
                "firings": len(places),
                "weighted": bool((weights != 1).any()),
            },
        )

    def sample(
        self, latent: LatentView
    ) -> tuple[Int64[np.ndarray, " contexts"], Grid, Float64[np.ndarray, " contexts"]]:
        """Contexts (ascending), laid out, and how many contexts each of them stands for."""
        view = latent.view
        everything, uniform = view.contexts, view.sampled
        if len(uniform) == len(everything):
            return uniform, view.grid, np.ones(len(uniform))
        firing = np.unique(latent.postings[0] // view.index.context)
        own = firing
        if len(firing) > self.config.own:
            rng = np.random.default_rng(derive(self.config.seed, "own", latent.id))
            own = np.sort(rng.choice(firing, self.config.own, replace=False))
        silent = np.setdiff1d(uniform, firing)
        contexts = np.union1d(own, silent)
        n_silent = len(everything) - len(firing)
        weights = np.where(
            np.isin(contexts, own), len(firing) / len(own), n_silent / len(silent) if len(silent) else 0.0
        )
        return contexts, view.grid_of(contexts), weights
