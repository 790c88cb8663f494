"""Learning a pattern: sequential covering over slots, with every rule's precision counted on the whole sample.

A rule is worth `k · s²` (k: firings that it is the first to cover; s: share of its new matches at which the latent
fires, shrunk towards what was known before). So a short rule that is nearly always right beats a broad one that is
often wrong, and a slot is added only when it buys more precision than it costs coverage. Rules are taken while they
can raise F1: that is, while their share is above half of the F1 that is reached (Lipton et al. 2014, 1402.1892).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from unmix.core.config import Config
from unmix.explain.grids import DEPTH, Grid, spread, whole_word
from unmix.explain.patterns import Pattern, Rule, Slot, rule_places
from unmix.explain.words import LEVELS, Level


class LearnConfig(Config):
    """How patterns are learnt."""

    max_rules: int = 64
    max_slots: int = 3
    min_firings: int = 2
    """Firings a rule must be the first to cover."""
    seeds: int = 3
    """One-slot rules that are grown before the best is taken."""
    tried: int = 16
    """Slots that are tried when a rule is grown, and one-slot rules that are counted exactly."""
    prior: float = 1.0
    """Matches that the shrinkage towards the known share weighs as much as."""
    grow: float = 1.15
    """A further slot must make the rule this many times as worthy."""
    words_shown: int = 200
    """Matches looked at to find the written words around a token."""


@dataclass(frozen=True)
class Feature:
    """One slot with one level id."""

    back: int
    level: Level
    id: int

    def slot(self, grid: Grid) -> Slot:
        """The same, by name."""
        return Slot(back=self.back, level=self.level, texts=(grid.table.name(self.level, self.id),))


@dataclass(frozen=True)
class Candidate:
    """A rule while it is grown: features, the uncovered places where they hold, and its worth."""

    features: tuple[Feature, ...]
    places: Int64[np.ndarray, " n"]
    fired: int
    share: float
    """Shrunk."""

    @property
    def worth(self) -> float:
        """Firings times share squared."""
        return self.fired * self.share**2


class Learner:
    """Learns one latent's pattern from the firings in a grid. Holds 6 bytes a place."""

    def __init__(
        self, grid: Grid, places: Int64[np.ndarray, " n"], values: Float32[np.ndarray, " n"], config: LearnConfig
    ) -> None:
        self.grid, self.config = grid, config
        self.places, self.values = places, values
        self.activation = np.zeros(grid.size, np.float32)
        self.activation[places] = values
        self.fires = np.zeros(grid.size, bool)
        self.fires[places] = True
        self.covered = np.zeros(grid.size, bool)
        self.base = len(places) / max(grid.trials, 1)

    def learn(self) -> Pattern:
        """Rules in the order in which they were taken, pruned and merged. Empty where nothing repeats."""
        taken: list[Candidate] = []
        hits = false = 0.0
        while len(taken) < self.config.max_rules:
            best = self._best()
            if best is None:
                break
            batch = [best, *self._siblings(best)] if len(best.features) == 1 else [best]
            useful = [c for c in batch if c.share > hits / max(hits + false + len(self.places), 1)]
            if not useful:
                break
            for candidate in useful[: self.config.max_rules - len(taken)]:
                self.covered[candidate.places] = True
                hits += candidate.fired
                false += len(candidate.places) - candidate.fired
                taken.append(candidate)
        return Pattern(rules=tuple(self._finish(taken)))

    def _best(self) -> Candidate | None:
        seeds = sorted(self._seeds(), key=lambda c: -c.worth)[: self.config.seeds]
        grown = [self._grow(seed) for seed in seeds]
        return max(grown, key=lambda c: c.worth, default=None)

    def _seeds(self) -> list[Candidate]:
        """One-slot rules, those that look best by counts over all matches, counted over uncovered ones."""
        rest = self.places[~self.covered[self.places]]
        guesses: list[tuple[float, Feature]] = []
        for back in range(DEPTH):
            for level in LEVELS:
                ids, k = np.unique(self.grid.level(level)[rest - back], return_counts=True)
                ids, k = ids[k >= self.config.min_firings], k[k >= self.config.min_firings]
                n = self.grid.totals(back, level)[ids]
                worth = k * self._shrunk(k, n, self.base) ** 2
                order = np.argsort(-worth, kind="stable")[: self.config.tried // 2]
                guesses += [(float(worth[i]), Feature(back, level, int(ids[i]))) for i in order]
        guesses.sort(key=lambda g: -g[0])
        found: list[Candidate] = []
        for _, feature in guesses[: self.config.tried]:
            places = self.grid.occurrences(feature.back, feature.level, feature.id)
            candidate = self._candidate((feature,), places[~self.covered[places]], self.base)
            if not any(_same(candidate, other) for other in found):
                found.append(candidate)
        return [c for c in found if c.fired >= self.config.min_firings]

    def _grow(self, candidate: Candidate) -> Candidate:
        while len(candidate.features) < self.config.max_slots and candidate.share < 0.95:
            best = max(self._children(candidate), key=lambda c: c.worth, default=None)
            if best is None or best.worth < self.config.grow * candidate.worth:
                return candidate
            candidate = best
        return candidate

    def _children(self, parent: Candidate) -> Iterator[Candidate]:
        fired = parent.places[self.fires[parent.places]]
        used = {(f.back, f.level) for f in parent.features}
        fullest: list[tuple[int, Feature]] = []
        for back in range(DEPTH):
            for level in LEVELS:
                if (back, level) in used or any(
                    b == back and LEVELS.index(lv) <= LEVELS.index(level) for b, lv in used
                ):
                    continue
                ids, k = np.unique(self.grid.level(level)[fired - back], return_counts=True)
                order = np.argsort(-k, kind="stable")[: self.config.tried // 4]
                fullest += [
                    (int(k[i]), Feature(back, level, int(ids[i]))) for i in order if k[i] >= self.config.min_firings
                ]
        fullest.sort(key=lambda g: -g[0])
        for k, feature in fullest[: self.config.tried]:
            if k < self.config.grow * parent.worth:
                break
            there = self.grid.level(feature.level)[parent.places - feature.back]
            kept = tuple(f for f in parent.features if f.back != feature.back)
            yield self._candidate((*kept, feature), parent.places[there == feature.id], parent.share)

    def _siblings(self, best: Candidate) -> Iterator[Candidate]:
        """Other one-slot rules of the same place and level that are about as precise: a set of tokens at one slot."""
        feature = best.features[0]
        rest = self.places[~self.covered[self.places]]
        ids, k = np.unique(self.grid.level(feature.level)[rest - feature.back], return_counts=True)
        n = self.grid.totals(feature.back, feature.level)[ids]
        share = self._shrunk(k, n, self.base)
        good = (k >= max(self.config.min_firings, 3)) & (share >= max(0.7, 0.8 * best.share)) & (ids != feature.id)
        for i in np.flatnonzero(good)[np.argsort(-k[good], kind="stable")]:
            places = self.grid.occurrences(feature.back, feature.level, int(ids[i]))
            sibling = Feature(feature.back, feature.level, int(ids[i]))
            yield self._candidate((sibling,), places[~self.covered[places]], self.base)

    def _candidate(self, features: tuple[Feature, ...], places: Int64[np.ndarray, " n"], known: float) -> Candidate:
        fired = int(np.count_nonzero(self.fires[places]))
        share = float(self._shrunk(np.float64(fired), np.float64(len(places)), known))
        return Candidate(features, places, fired, share)

    def _shrunk(self, k: np.ndarray | np.float64, n: np.ndarray | np.float64, known: float) -> np.ndarray | np.float64:
        return (k + self.config.prior * known) / (n + self.config.prior)

    def _finish(self, taken: Sequence[Candidate]) -> list[Rule]:
        """Candidates as rules, the most certain first; those that lower F1 dropped, and contexts merged."""
        kept: list[Candidate] = []
        hits = false = 0.0
        for candidate in sorted(taken, key=lambda c: (-c.share, -c.fired)):
            if candidate.share > hits / max(hits + false + len(self.places), 1):
                kept.append(candidate)
                hits += candidate.fired
                false += len(candidate.places) - candidate.fired
        slots = [tuple(sorted((f.slot(self.grid) for f in c.features), key=lambda s: s.back)) for c in kept]
        merged = merge_contexts(slots)
        self.covered[:] = False
        rules = [self._rule(one) for one in merged]
        return sorted((r for r in rules if r.gain), key=lambda r: -r.mass)

    def _rule(self, slots: tuple[Slot, ...]) -> Rule:
        places = rule_places(slots, self.grid)
        fired = places[self.fires[places]]
        new = fired[~self.covered[fired]]
        self.covered[places] = True
        total = float(np.abs(self.values).sum(dtype=np.float64)) or 1.0
        words = Counter(whole_word(self.grid, int(p)) for p in spread(fired, self.config.words_shown))
        return Rule(
            slots=slots,
            activation=float(self.activation[places].mean(dtype=np.float64)) if len(places) else 0.0,
            matches=len(places),
            fired=len(fired),
            gain=len(new),
            mass=float(np.abs(self.activation[new]).sum(dtype=np.float64)) / total,
            words=tuple(sorted(words.items(), key=lambda w: (-w[1], w[0]))[:8]),
        )


def merge_contexts(rules: Sequence[tuple[Slot, ...]]) -> list[tuple[Slot, ...]]:
    """Rules that differ in the texts of one slot before the token become one rule with a set there."""
    merged: list[tuple[Slot, ...]] = []
    for rule in rules:
        for i, other in enumerate(merged):
            place = _one_difference(rule, other)
            if place is not None and rule[place].back > 0:
                texts = dict.fromkeys([*other[place].texts, *rule[place].texts])
                slot = other[place].model_copy(update={"texts": tuple(texts)})
                merged[i] = (*other[:place], slot, *other[place + 1 :])
                break
        else:
            merged.append(rule)
    return merged


def _one_difference(a: tuple[Slot, ...], b: tuple[Slot, ...]) -> int | None:
    if [(s.back, s.level) for s in a] != [(s.back, s.level) for s in b]:
        return None
    places = [i for i, (x, y) in enumerate(zip(a, b)) if x.texts != y.texts]
    return places[0] if len(places) == 1 else None


def _same(a: Candidate, b: Candidate) -> bool:
    return len(a.places) == len(b.places) and np.array_equal(a.places, b.places)
