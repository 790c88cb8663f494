"""Latents in order: by frequency, activation, place in the context, or hold on a few tokens; what is noise is left out.

A latent that fires a handful of times tops every ranking of extremes by chance. So each ranking leaves out what `Noise`
says, and the ranking by place also what chance explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.figures import Figures
from unmix.index.statistics import RANKS

KINDS = ("frequency", "rare", "documents", "max", "mean", "median", "skew", "kurtosis", "place", "token")
UNITS = {
    "frequency": "of positions", "rare": "of positions", "documents": "of documents", "max": "activation",
    "mean": "activation", "median": "activation", "skew": "", "kurtosis": "", "place": "bits", "token": "of strength",
}  # fmt: skip
SIGNIFICANCE = 0.01
"""Chance, over all latents of a ranking together, that one of them stands in it by chance."""


@dataclass(frozen=True)
class Noise:
    """Which latents a ranking leaves out."""

    min_firings: int = 10
    min_documents: int = 2
    max_frequency: float = 1.0
    """Latents above are left out: 0.1 keeps dense ones away."""
    single_token: bool = True
    """Whether latents with nine tenths of their strength on one token stay."""

    def keeps(self, figures: Figures) -> Bool[np.ndarray, " latents"]:
        """Which latents stay."""
        keep = (figures.firings >= max(self.min_firings, 1)) & (figures.documents >= self.min_documents)
        keep &= figures.frequency <= self.max_frequency
        return keep if self.single_token else keep & ~figures.single_token_strong


@dataclass(frozen=True)
class Ranking:
    """Latents, first one first, with what they are ranked by."""

    kind: str
    latents: Int64[np.ndarray, " n"]
    values: Float64[np.ndarray, " n"]
    considered: int
    """Latents that noise did not take away."""


def rank(figures: Figures, kind: str, n: int | None = None, noise: Noise | None = None) -> Ranking:
    """The first `n` latents (None: all that are considered) of a ranking; ties by id.

    Kinds: "frequency" and "rare" (share of positions, largest and smallest first), "documents" (share of documents),
    "max", "mean", "median" (of |activation|; the mean keeps signs), "skew", "kurtosis", "place" (information in bits
    that a firing gives about its place in the context, latents whose places chance explains left out), "token" (share
    of the strength on one token).

    Raises:
        ConfigError: no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"no ranking by {kind!r}. {did_you_mean(kind, KINDS)}")
    if n is not None and n < 0:
        raise ConfigError(f"n is {n}, expected 0 or more")
    keep = (noise or Noise()).keeps(figures)
    values, keep = _values(figures, kind, keep)
    latents = np.flatnonzero(keep)
    order = latents[np.argsort(values[latents] if kind == "rare" else -values[latents], kind="stable")][:n]
    return Ranking(kind, order, values[order], len(latents))


def _values(
    figures: Figures, kind: str, keep: Bool[np.ndarray, " latents"]
) -> tuple[Float64[np.ndarray, " latents"], Bool[np.ndarray, " latents"]]:
    if kind == "place":
        bits, chance = place_information(figures.places, figures.place_totals)
        return bits, keep & (chance * max(int(keep.sum()), 1) < SIGNIFICANCE)
    values = {
        "frequency": lambda: figures.frequency,
        "rare": lambda: figures.frequency,
        "documents": lambda: figures.documents / max(figures.n_documents, 1),
        "max": lambda: figures.max,
        "mean": lambda: figures.mean,
        "median": lambda: figures.quantiles[:, RANKS.index(50)],
        "skew": lambda: figures.skew,
        "kurtosis": lambda: figures.kurtosis,
        "token": lambda: figures.single_token_share,
    }[kind]()
    return np.asarray(values, np.float64), keep


def place_information(
    places: Integer[np.ndarray, "latents bins"], totals: Int64[np.ndarray, " bins"]
) -> tuple[Float64[np.ndarray, " latents"], Float64[np.ndarray, " latents"]]:
    """How far the places of each latent's firings are from those of all positions: bits, and how likely by chance.

    Bits are the Kullback–Leibler divergence of the two distributions over the sixteenths of the context, less its
    bias on few firings, (bins − 1) / 2n nats (Miller and Madow 1955). Chance is the likelihood-ratio (G) test's p, as
    if firings were independent: those of one document are not quite, so it is a filter for noise, no proof.
    """
    used = totals > 0
    expected = totals[used] / max(int(totals.sum()), 1)
    fired = places[:, used].astype(np.float64)
    n = fired.sum(axis=1)
    share = fired / np.maximum(n, 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(share > 0, share * np.log(share / expected), 0.0)
    nats = terms.sum(axis=1)
    free = max(int(used.sum()) - 1, 0)
    bits = np.maximum(nats - free / (2 * np.maximum(n, 1)), 0) / math.log(2)
    return np.where(n > 0, bits, 0.0), chi_square_tail(2 * n * nats, free)


def chi_square_tail(x: Float64[np.ndarray, " n"], free: int) -> Float64[np.ndarray, " n"]:
    """P(χ² > x) with `free` degrees of freedom, by its finite series (Abramowitz and Stegun 26.4.4 and 26.4.5)."""
    if free < 1:
        return np.ones_like(x)
    half = np.maximum(x, 0) / 2
    odd = free % 2
    tail = np.array([math.erfc(math.sqrt(h)) for h in half.tolist()]) if odd else np.zeros_like(half)
    with np.errstate(divide="ignore"):
        log = np.where(half > 0, np.log(half), -np.inf)
    for i in range((free + 1) // 2 - odd):
        power = i + odd / 2
        term = np.exp((power * log if power else 0.0) - half - math.lgamma(power + 1))
        tail = tail + term
    return np.where(x > 0, np.minimum(tail, 1.0), 1.0)


def listed(figures: Figures, what: str, above: float = 0.1) -> Int64[np.ndarray, " n"]:
    """Ids of the latents that are "dead" (never fire), "dense" (fire on more than `above` of the positions) or
    "single-token" (nine tenths of the strength on one token); ascending."""
    found = {
        "dead": lambda: ~figures.alive,
        "dense": lambda: figures.frequency > above,
        "single-token": lambda: figures.single_token_strong,
    }
    if what not in found:
        raise ConfigError(f"no list of latents {what!r}. {did_you_mean(what, tuple(found))}")
    return np.flatnonzero(found[what]())


def frequency_histogram(
    figures: Sequence[Figures], bins_per_decade: int = 4
) -> tuple[Float64[np.ndarray, " edges"], list[Int64[np.ndarray, " bins"]]]:
    """Alive latents by log10 frequency, of several coders over the same edges (of log10), so that they compare."""
    logs = [np.log10(one.frequency[one.alive]) for one in figures]
    low = math.floor(min((float(one.min()) for one in logs if len(one)), default=-6.0))
    edges = np.linspace(low, 0.0, -low * bins_per_decade + 1) if low < 0 else np.array([-1.0, 0.0])
    return edges, [np.histogram(np.clip(one, edges[0], edges[-1]), edges)[0].astype(np.int64) for one in logs]
