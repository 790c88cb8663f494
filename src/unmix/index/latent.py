"""`Latent`: one latent of an open index."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Integer, UInt64

from unmix.core.errors import ConfigError
from unmix.index.figures import Figures
from unmix.index.filters import Documents, Where, make_filter
from unmix.index.firings import Firings, LatentFirings, read_filtered
from unmix.index.layout import RoleFilter
from unmix.index.negatives import NEIGHBOURS as DRAWN_FROM
from unmix.index.sets import Combines, LatentSet, single
from unmix.index.shared import SharedStore
from unmix.index.statistics import NEIGHBOURS, RANKS, TOP_TOKENS, histogram_edges, top_tokens
from unmix.index.store import PostingStore
from unmix.index.windows import stream
from unmix.metrics.windows import window_html


@dataclass(frozen=True)
class TopToken:
    """A token on which a latent fires."""

    token: int
    string: str | None
    sum: float
    """Summed strength (|activation|) over the token's firings."""
    count: int

    @property
    def mean(self) -> float:
        """Mean strength over the token's firings."""
        return self.sum / self.count


@dataclass(frozen=True)
class CoFiring:
    """Another latent of the same coder that fires at the same positions."""

    latent: int
    jaccard: float
    """Positions at which both fire over positions at which at least one does (an estimate on a large index)."""
    both: int
    """Positions at which both fire, by the Jaccard index and both frequencies."""
    firings: int
    """The other's own firings."""


@dataclass(frozen=True)
class Moments:
    """Of a latent's activation where it fires, over all roles (ddof 0); 0 where it never does."""

    count: int
    mean: float
    std: float
    skew: float
    kurtosis: float
    """Excess: 0 for a normal distribution."""


class Latent(Combines):
    """Postings, windows and figures of one latent. Reads on demand; holds nothing but where to look.

    `a & b`, `a | b`, `a - b` and `a.near(b, 5)` are sets of positions (`LatentSet`), of latents of any coders of one
    index.
    """

    def __init__(self, coder: str, id: int, store: SharedStore, postings: PostingStore, figures: Figures) -> None:
        super().__init__(store)
        self.coder, self.id = coder, id
        self._postings, self._figures = postings, figures

    def __repr__(self) -> str:
        return f"<latent {self.id} of {self.coder!r}: frequency {self.frequency:.4%}, max {self.max:.4g}>"

    def _repr_html_(self) -> str:
        """Its five strongest windows, shaded, for notebooks."""
        shown = [
            window_html(
                w.strings or [f"<{token}>" for token in w.tokens], w.values.tolist(), self.max, w.peak_at
            )
            for w in self.top(5)
        ]  # fmt: skip
        return f"<div><code>{html.escape(repr(self))}</code>{''.join(shown)}</div>"

    @property
    def frequency(self) -> float:
        """Share of the unmasked positions on which it fires, over all roles."""
        return float(self._figures.frequency[self.id])

    @property
    def max(self) -> float:
        """Largest |activation| over all roles; 0.0 where it never fires."""
        return float(self._figures.max[self.id])

    @property
    def mean(self) -> float:
        """Mean activation where it fires, over all roles."""
        return float(self._figures.mean[self.id])

    @property
    def count(self) -> int:
        """Firings, over all roles."""
        return int(self._figures.firings[self.id])

    def histogram(self) -> tuple[Float64[np.ndarray, " 65"], Integer[np.ndarray, " 64"]]:
        """`(edges, counts)` of |activation| over all roles, in half octaves; the outer edges are 0 and infinity."""
        return histogram_edges(), np.asarray(self._figures.histogram[self.id], np.int64)

    def quantiles(self) -> tuple[Float64[np.ndarray, " 11"], Float64[np.ndarray, " 11"]]:
        """`(shares, strengths)`: |activation| at 0 (least), 0.1 … 1 (most) of its firings; see `Figures.quantiles`."""
        return np.array(RANKS) / 100, np.asarray(self._figures.quantiles[self.id], np.float64)

    @property
    def moments(self) -> Moments:
        """Mean, standard deviation, skew and kurtosis of the activation where it fires."""
        f, i = self._figures, self.id
        return Moments(self.count, self.mean, float(f.std[i]), float(f.skew[i]), float(f.kurtosis[i]))

    def co_firing(self, n: int = NEIGHBOURS) -> list[CoFiring]:
        """The `n` latents of its coder (at most 64) that most fire together with it, by Jaccard index."""
        if not 0 <= n <= NEIGHBOURS:
            raise ConfigError(f"n is {n}, expected 0 to {NEIGHBOURS}: an index keeps {NEIGHBOURS} neighbours")
        ids, jaccard = self._figures.co_firing_ids[self.id, :n], self._figures.co_firing_jaccard[self.id, :n]
        found: list[CoFiring] = []
        for latent, share in zip(ids.tolist(), jaccard.tolist(), strict=True):
            if latent >= 0:
                firings = int(self._figures.firings[latent])
                found.append(CoFiring(latent, share, round(share * (self.count + firings) / (1 + share)), firings))
        return found

    def postings(
        self, role: RoleFilter = None, *, where: Where = None, documents: Documents = None
    ) -> tuple[UInt64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Global positions, ascending, and activations of every firing in the given roles, slices and documents."""
        positions, values = read_filtered(self.firings, make_filter(self._store, role, where, documents))
        return positions.astype(np.uint64), values

    def top_tokens(self, n: int = TOP_TOKENS, role: RoleFilter = None) -> list[TopToken]:
        """The `n` tokens with the largest summed strength, at most ten.

        Without a role these are the stored figures; with one they are counted from the role's own postings,
        so that nothing of other roles shows.
        """
        if not 0 <= n <= TOP_TOKENS:
            raise ConfigError(f"n is {n}, expected 0 to {TOP_TOKENS}: an index keeps {TOP_TOKENS} top tokens")
        if role is None:
            stored = (self._figures.top_token_ids, self._figures.top_token_sums, self._figures.top_token_counts)
            ids, sums, counts = (field[self.id] for field in stored)
        else:
            positions, values = read_filtered(self.firings, make_filter(self._store, role))
            tokens = self._store.tokens.reshape(-1)[positions]
            latent, strength = np.zeros(len(tokens), np.int64), np.abs(values).astype(np.float64)
            found = top_tokens(np.array([len(tokens)]), latent, tokens, strength)
            ids, sums, counts = (field[0] for field in found)
        strings = self._store.strings(np.maximum(ids, 0))
        return [
            TopToken(int(ids[i]), strings[i] if strings else None, float(sums[i]), int(counts[i]))
            for i in range(n)
            if counts[i]
        ]

    @property
    def firings(self) -> LatentFirings:
        """Where it fires, for drawing windows."""
        return LatentFirings(self._postings, self._figures, self.id)

    def as_set(self) -> LatentSet:
        """All of its positions and values, in memory."""
        return single(self._store, self.coder, self.id, *self._postings.read(self.id), self.max)

    def _stream(self, seed: int, kind: str) -> int:
        return stream(seed, kind, self.coder, self.id)

    def _nearest(self, neighbours: Sequence[int] | None) -> list[tuple[int, Firings]]:
        if neighbours is None:
            neighbours = [other.latent for other in self.co_firing(DRAWN_FROM)]
        found: list[tuple[int, Firings]] = []
        for id in neighbours:
            if not 0 <= id < self._postings.n_latents or id == self.id:
                raise ConfigError(
                    f"neighbour {id} of latent {self.id}: expected another of the latents 0 to "
                    f"{self._postings.n_latents - 1}"
                )
            found.append((int(id), LatentFirings(self._postings, self._figures, int(id))))
        return found
