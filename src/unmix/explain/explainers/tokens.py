"""`tokens`: where a latent's activation lies, by token, token before, kind and place. No language model."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int64

from unmix.core.config import Config
from unmix.explain.grids import Grid, spread, whole_word
from unmix.explain.nouns import KIND_MANY, families, family_name, listed, quoted, token_name
from unmix.explain.patterns import Pattern, Rule, Slot
from unmix.explain.results import Draft
from unmix.explain.windows import LatentView
from unmix.explain.words import KINDS, Level


class TokensConfig(Config):
    """How much is kept and looked at."""

    rules: int = 64
    """Tokens that are predicted to fire, at most."""
    min_firings: int = 2
    prior: float = 1.0
    """Occurrences that the shrinkage of a token's share towards the latent's frequency weighs as much as."""
    words: int = 1000
    """Firings looked at for written words."""
    listed: int = 10
    """Entries of each table of shares."""


class TokensExplainer:
    """Counts, says it in one line, and predicts each token's mean activation."""

    Config: ClassVar[type[Config]] = TokensConfig

    def __init__(self, config: TokensConfig) -> None:
        self.config = config

    def explain(self, latent: LatentView) -> Draft:
        """The line, the tables and the pattern. `LatentError` `NoFirings` where there is nothing to count."""
        view, grid = latent.view, latent.view.grid
        latent.require_firings()
        places, values = latent.firings(view.sampled, grid)
        mass = np.abs(values).astype(np.float64)
        mass /= mass.sum() or 1.0
        tables = self._tables(grid, places, mass)
        pattern = self._pattern(grid, places, values, mass)
        return Draft(sentence(tables), {"pattern": pattern.to_json(), "firings": len(places), "shares": tables})

    def _tables(self, grid: Grid, places: Int64[np.ndarray, " n"], mass: Float[np.ndarray, " n"]) -> dict[str, Any]:
        n = self.config.listed
        some = spread(np.arange(len(places)), self.config.words)
        words = [(whole_word(grid, int(places[i])), float(mass[i])) for i in some]
        top, total = _summed(words), sum(weight for _, weight in words) or 1.0
        grouped = families(top)
        first = set(grouped[0][0]) if grouped else set[str]()
        inside = np.array([word in first for word, _ in words], bool)
        offsets = places % grid.width - (grid.width - grid.length)
        sixteenths = np.bincount(offsets * 16 // grid.length, weights=mass, minlength=16)
        return {
            "families": [[names[:4], round(weight / total, 4)] for names, weight in grouped[:n]],
            "tokens": _shares(grid, places, mass, 0, "token", n),
            "previous": _shares(grid, places, mass, 1, "form", n),
            "previous_of_first": _shares(grid, places[some][inside], mass[some][inside], 1, "form", n),
            "kinds": _shares(grid, places, mass, 0, "kind", len(KINDS)),
            "places": [round(float(share), 4) for share in sixteenths],
        }

    def _pattern(
        self,
        grid: Grid,
        places: Int64[np.ndarray, " n"],
        values: Float[np.ndarray, " n"],
        mass: Float[np.ndarray, " n"],
    ) -> Pattern:
        """Tokens whose share of firing occurrences can raise F1 (as in `rules.py`), with their mean activation."""
        ids, inverse = np.unique(grid.level("token")[places], return_inverse=True)
        fired, summed = np.bincount(inverse), np.bincount(inverse, weights=values)
        weight, seen = np.bincount(inverse, weights=mass), grid.totals(0, "token")[ids]
        base = len(places) / max(grid.trials, 1)
        share = (fired + self.config.prior * base) / (seen + self.config.prior)
        rules: list[Rule] = []
        hits = false = 0
        for i in np.lexsort((-fired, -share)):
            if len(rules) == self.config.rules:
                break
            if fired[i] < self.config.min_firings:
                continue
            if share[i] <= hits / max(hits + false + len(places), 1):
                break
            hits, false = hits + int(fired[i]), false + int(seen[i] - fired[i])
            slot = Slot(back=0, level="token", texts=(grid.table.name("token", int(ids[i])),))
            rules.append(
                Rule(
                    slots=(slot,), activation=float(summed[i] / seen[i]), matches=int(seen[i]), fired=int(fired[i]),
                    gain=int(fired[i]), mass=float(weight[i]),
                )
            )  # fmt: skip
        return Pattern(rules=tuple(sorted(rules, key=lambda rule: -rule.mass)))


def _summed(words: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The 200 heaviest words."""
    sums: dict[str, float] = {}
    for word, weight in words:
        sums[word] = sums.get(word, 0.0) + weight
    return sorted(sums.items(), key=lambda entry: -entry[1])[:200]


def _shares(
    grid: Grid, places: Int64[np.ndarray, " n"], mass: Float[np.ndarray, " n"], back: int, level: Level, n: int
) -> list[tuple[str, float]]:
    """`(name, share of the mass)` of the `n` heaviest ids `back` tokens before `places`."""
    total = float(mass.sum())
    if not total:
        return []
    sums = np.bincount(grid.level(level)[places - back], weights=mass)
    order = np.argsort(-sums, kind="stable")[:n]
    return [(grid.table.name(level, int(i)), round(float(sums[i]) / total, 4)) for i in order if sums[i] > 0]


def sentence(tables: dict[str, Any]) -> str:
    """One line: the words (or the kind of token) that hold most of the activation, and what comes before them."""
    named: list[tuple[list[str], float]] = [(names, share) for names, share in tables["families"]]
    kind, kind_share = tables["kinds"][0]
    held, shown = 0.0, list[str]()
    for names, share in named[:3]:
        if shown and (held >= 0.75 or share < 0.08):
            break
        shown.append(family_name(names))
        held += share
    if len(shown) == 1 and held >= 0.4:
        before = _before(tables["previous_of_first"])
        return f"{_alone(named[0][0])} ({held:.0%} of activation){before}{_start(tables)}"
    if held >= 0.5:
        return f"{listed(shown, 'and')} ({held:.0%} of activation){_before(tables['previous'])}{_start(tables)}"
    if kind_share >= 0.75 and kind not in ("word", "piece"):
        top = listed([family_name(names) for names, _ in named[:2]], "and")
        return f"{KIND_MANY[kind]} ({kind_share:.0%} of activation), most of all {top}{_before(tables['previous'])}"
    top = ", ".join(family_name(names) for names, _ in named[:4])
    part = sum(share for _, share in named[:4])
    return f"many tokens, {top} first ({part:.0%} of activation){_before(tables['previous'])}{_start(tables)}"


def _alone(names: list[str]) -> str:
    if len(names) == 1:
        return token_name(names[0])
    return f"{quoted(min(names, key=len))} and its forms"


def _before(previous: list[tuple[str, float]]) -> str:
    if not previous or previous[0][1] < 0.5:
        return ""
    return f", {'nearly always' if previous[0][1] >= 0.9 else 'mostly'} after {token_name(previous[0][0])}"


def _start(tables: dict[str, Any]) -> str:
    return ", near the start of a context" if tables["places"][0] >= 0.5 else ""
