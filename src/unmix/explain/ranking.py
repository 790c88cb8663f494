"""In which order latents are shown: those that a newcomer sees the meaning of at once come first."""

from __future__ import annotations

import math
import re

from unmix.explain.ledger import Ledger
from unmix.explain.rows import Explanation, Score
from unmix.explain.table import RANDOM
from unmix.index.reader import LatentIndex

USUAL = (2e-4, 1e-2)
"""Frequencies at which a latent is neither a rarity nor everywhere."""
_QUOTED = re.compile(r"[\"'`]([^\"'`]+)[\"'`]")


def ranked(ledger: Ledger, index: LatentIndex, coder: str | None = None) -> list[int]:
    """Every latent that fires: scored ones by `quality`, then explained ones, then the others by usualness.

    Random explanations do not count. Ties by id.
    """
    found = index.coder(coder)
    best: dict[int, float] = {}
    scores: dict[int, list[Score]] = {}
    for score in ledger.scores(index_hash=index.hash, status="done"):
        scores.setdefault(score.explanation_id, []).append(score)
    for explanation in ledger.explanations(index_hash=index.hash, coder=found.name, status="done"):
        if explanation.method.startswith(RANDOM):
            continue
        usual = usualness(float(found.frequency[explanation.latent]))
        worth = quality(explanation, scores.get(explanation.id, [])) * (0.5 + 0.5 * usual)
        best[explanation.latent] = max(worth, best.get(explanation.latent, 0.0))
    rest = [int(i) for i in found.alive.nonzero()[0] if int(i) not in best]
    rest.sort(key=lambda i: (-round(usualness(float(found.frequency[i])), 6), i))
    return [*sorted(best, key=lambda i: (-best[i], i)), *rest]


def quality(explanation: Explanation, scores: list[Score]) -> float:
    """How right the explanation is times how readable it is, 0 to 1."""
    parts: list[float] = []
    for score in scores:
        f1, pearson = score.figures.get("f1"), score.figures.get("pearson")
        judged = score.figures.get("balanced_accuracy")
        if judged is not None:
            parts.append(max(2 * judged - 1, 0.0))
        elif f1 is not None:
            parts.append((f1 + max(pearson or 0.0, 0.0)) / 2)
    right = sum(parts) / len(parts) if parts else 0.0
    return right * clarity(explanation.text or "")


def clarity(text: str) -> float:
    """1 for a short line about one or two real words; less for each further word, for leftovers, hedges, special
    tokens, single letters and marks, and long lines."""
    worth = 1.0
    families = len(_QUOTED.findall(re.sub(r'"/"[^"]*"', '"', text)))
    worth *= 0.92 ** max(families - 2, 0)
    if "among others" in text or text.startswith("many tokens"):
        worth *= 0.7
    if re.search(r"\b(often|sometimes)\b", text):
        worth *= 0.9
    if left := re.search(r"and (\d+) more", text):
        worth *= 0.8 if int(left[1]) < 10 else 0.6
    if re.search(r"<\|?\w+\|?>", text):
        worth *= 0.5  # a special token: true, and no news to anybody
    if len(text) > 80:
        worth *= 0.9
    words = [word for quote in _QUOTED.findall(text) for word in re.findall(r"[^\W\d_]+", quote)]
    if not any(len(word) > 3 for word in words):
        worth *= 0.75
    return worth


def usualness(frequency: float) -> float:
    """1 inside `USUAL`, falling by a factor of e for each factor of ten outside; 0 for a latent that never fires."""
    if frequency <= 0:
        return 0.0
    low, high = USUAL
    away = max(math.log10(low / frequency), math.log10(frequency / high), 0.0)
    return math.exp(-away)
