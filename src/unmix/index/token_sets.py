"""Latents by a set of tokens: which of them fire mostly there. The other way round is `CoderIndex.latents_on`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.rankings import Noise
from unmix.index.reader import LatentIndex
from unmix.index.statistics import chunks
from unmix.index.store import PostingStore, TokenStore

ORDERS = ("share", "strength", "recall", "f1", "count")
SWEEP = 2**22
READ = 2**20


@dataclass(frozen=True)
class TokenSetHit:
    """A latent, and how much of it lies on the tokens asked for."""

    latent: int
    count: int
    """Firings on the tokens."""
    firings: int
    share: float
    """Part of its firings that lie on the tokens."""
    strength: float
    """Part of its strength that lies on the tokens."""
    recall: float
    """Part of the tokens' occurrences on which it fires."""
    lift: float
    """`share` over the tokens' share of all positions: how many times more often than by chance."""

    @property
    def f1(self) -> float:
        """Harmonic mean of share and recall: as if the latent were a detector of these tokens."""
        return 2 * self.share * self.recall / (self.share + self.recall) if self.count else 0.0


def latents_by_tokens(
    index: LatentIndex,
    tokens: Sequence[int],
    n: int | None = None,
    *,
    coder: str | None = None,
    by: str = "share",
    noise: Noise | None = None,
    everywhere: bool = False,
) -> list[TokenSetHit]:
    """Latents of the largest share of firings on a set of token ids, figures exact; ties by count, then by id.

    Looked at are latents that have one of the tokens among their ten strongest or ten most frequent ones; with
    `everywhere` all of them, which reads every posting (some 2 s for 100 M).

    Args:
        coder: its name; needed where the index holds several.
        by: "share" (of the firings), "strength" (its share), "recall", "f1" (of share and recall) or "count".

    Raises:
        ConfigError: no token, a negative one, or no such order.
    """
    if by not in ORDERS:
        raise ConfigError(f"cannot order latents by {by!r}. {did_you_mean(by, ORDERS)}")
    wanted = np.unique(np.asarray(tokens, np.int64))
    if not len(wanted) or wanted[0] < 0:
        raise ConfigError(f"tokens are {list(tokens)}, expected at least one id of 0 or more")
    chosen = index.coder(coder)
    figures = chosen.figures
    keep = (noise or Noise()).keeps(figures)
    if not everywhere:
        stored = (figures.top_token_ids, figures.frequent_token_ids)
        keep &= np.logical_or.reduce([np.isin(ids, wanted).any(axis=1) for ids in stored])
    latents = np.flatnonzero(keep)
    occurrences, positions = _occurrences(index.store, wanted)
    postings = PostingStore(index.folder, index.description, index.description.coders[chosen.name])
    count, sums = _on_tokens(index.store, postings, latents, wanted)
    share = count / np.maximum(figures.firings[latents], 1)
    hits = [
        TokenSetHit(
            int(latent), int(count[i]), int(figures.firings[latent]), float(share[i]),
            float(sums[i] / figures.strength[latent]) if figures.strength[latent] else 0.0,
            float(count[i] / max(occurrences, 1)), float(share[i] * positions / max(occurrences, 1)),
        )
        for i, latent in enumerate(latents)
        if count[i]
    ]  # fmt: skip
    return sorted(hits, key=lambda hit: (-getattr(hit, by), -hit.count, hit.latent))[:n]


def _occurrences(store: TokenStore, wanted: Int64[np.ndarray, " tokens"]) -> tuple[int, int]:
    """Unmasked positions with one of the tokens, and unmasked positions."""
    found, positions = 0, 0
    step = max(SWEEP // store.context, 1)
    for first in range(0, store.n_contexts, step):
        last = min(first + step, store.n_contexts)
        mask = store.mask(np.arange(first, last))
        found += int((_among(store.tokens[first:last], wanted) & mask).sum())
        positions += int(mask.sum())
    return found, positions


def _on_tokens(
    store: TokenStore, postings: PostingStore, latents: Int64[np.ndarray, " n"], wanted: Int64[np.ndarray, " tokens"]
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Firings and summed strength of each latent on the tokens."""
    tokens, n = store.tokens.reshape(-1), postings.n_latents
    # Neighbours are read at once.
    neighbours = np.split(latents, np.flatnonzero(np.diff(latents) != 1) + 1) if len(latents) else []
    runs = [
        (int(some[0]) + first, int(some[0]) + last)
        for some in neighbours
        for first, last in chunks(postings.counts[some], READ)
    ]
    counts, sums = np.zeros(n, np.int64), np.zeros(n)
    for first, last in runs:
        part = postings.part(first, last)
        on = np.flatnonzero(_among(tokens[part.positions], wanted))
        latent = np.repeat(np.arange(last - first), part.counts)[on]
        counts[first:last] = np.bincount(latent, minlength=last - first)
        sums[first:last] = np.bincount(latent, np.abs(part.values[on]).astype(np.float64), last - first)
    return counts[latents], sums[latents]


def _among(tokens: np.ndarray, wanted: Int64[np.ndarray, " tokens"]) -> np.ndarray:
    if len(wanted) == 1:
        return tokens == wanted[0]
    place = np.searchsorted(wanted, tokens)
    place[place == len(wanted)] = 0
    return wanted[place] == tokens
