"""Two sides' counts of every latent, and what they say about its difference. Knows no index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from unmix.index.differences.testing import cohen_h, q_values, rate_p, share_p

ALIKE = 1.1
"""Documents count as equally long on both sides where their mean lengths differ by no more than this factor."""
MANY = 100.0
"""Documents with the latent that the smaller side must be expected to have before the normal test of rates is trusted.

With 15, simulated log-normal clusters (σ 1.5; 100 long documents against 1,000 short ones) have four times the false
discoveries that they may: the rate of a few uneven clusters is not normal yet.
"""


@dataclass(frozen=True, eq=False)
class Counts:
    """What is stored of each latent over one side; squares and `cross` are sums over documents."""

    tokens: int
    """Unmasked positions."""
    n_documents: int
    token_squares: int
    """Σ (positions of a document)²."""
    firings: Int64[np.ndarray, " latents"]
    documents: Int64[np.ndarray, " latents"]
    """Documents in which each latent fires."""
    sum: Float64[np.ndarray, " latents"]
    squares: Int64[np.ndarray, " latents"]
    """Σ (firings in a document)²."""
    cross: Int64[np.ndarray, " latents"]
    """Σ (firings in a document) · (its positions)."""

    @property
    def rate(self) -> Float64[np.ndarray, " latents"]:
        """Firings a token."""
        return self.firings / self.tokens

    @property
    def share(self) -> Float64[np.ndarray, " latents"]:
        """Share of the documents in which each latent fires."""
        return self.documents / self.n_documents

    @property
    def mean(self) -> Float64[np.ndarray, " latents"]:
        """Mean activation where it fires; 0 where it never does."""
        return self.sum / np.maximum(self.firings, 1)

    @property
    def length(self) -> float:
        """Mean unmasked positions of a document."""
        return self.tokens / self.n_documents

    def spread(self, rate: Float64[np.ndarray, " latents"]) -> Float64[np.ndarray, " latents"]:
        """Σ over documents of (firings − rate · positions)²."""
        return np.maximum(self.squares - 2 * rate * self.cross + rate**2 * self.token_squares, 0.0)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Effect sizes and tests, one entry a latent; p and q are NaN where a latent was not tested."""

    tested: Bool[np.ndarray, " latents"]
    log2_ratio: Float64[np.ndarray, " latents"]
    low: Float64[np.ndarray, " latents"]
    high: Float64[np.ndarray, " latents"]
    cohen_h: Float64[np.ndarray, " latents"]
    p_share: Float64[np.ndarray, " latents"]
    p_rate: Float64[np.ndarray, " latents"]
    p: Float64[np.ndarray, " latents"]
    q: Float64[np.ndarray, " latents"]


def alike(a: Counts, b: Counts) -> bool:
    """Whether documents are about as long on both sides, so that shares of documents can be compared."""
    return 1 / ALIKE <= a.length / b.length <= ALIKE


def weigh(a: Counts, b: Counts, min_documents: int) -> Evidence:
    """Test every latent that fires in at least `min_documents` documents, both sides together.

    That number is the same whichever side the documents are on, so choosing by it leaves the tests unbiased.
    """
    fired = a.documents + b.documents
    tested = fired >= min_documents
    common = (a.firings + b.firings) / (a.tokens + b.tokens)
    spreads = a.spread(a.rate), b.spread(b.rate)
    p_rate = rate_p(
        a.rate - b.rate, spreads, a.spread(common) + b.spread(common), (a.tokens, b.tokens),
        (a.token_squares, b.token_squares),
    )  # fmt: skip
    p_share = share_p(a.documents, a.n_documents, b.documents, b.n_documents)
    many = fired * (min(a.n_documents, b.n_documents) / (a.n_documents + b.n_documents)) >= MANY
    p = np.where(tested, _combined(p_share, p_rate, many, alike(a, b)), np.nan)
    q = np.full(len(p), np.nan)
    q[tested] = q_values(p[tested])
    ratio, error = _ratio(a, b, spreads)
    h = cohen_h(a.share, b.share)
    return Evidence(tested, ratio, ratio - 1.96 * error, ratio + 1.96 * error, h, p_share, p_rate, p, q)


def _combined(
    shares: Float64[np.ndarray, " latents"],
    rates: Float64[np.ndarray, " latents"],
    many: Bool[np.ndarray, " latents"],
    alike: bool,
) -> Float64[np.ndarray, " latents"]:
    """One p-value from both tests.

    Where documents are about as long on both sides, either kind of difference counts, and the smaller p-value is
    doubled for having looked twice. Where they are not, the longer ones have a larger share for no other reason, so
    the rate decides. With too few documents for the test of rates, shares decide, or both have to differ.
    """
    if alike:
        return np.where(many, np.minimum(2 * np.minimum(shares, rates), 1.0), shares)
    return np.where(many, rates, np.maximum(shares, rates))


def _ratio(
    a: Counts, b: Counts, spreads: tuple[Float64[np.ndarray, " latents"], Float64[np.ndarray, " latents"]]
) -> tuple[Float64[np.ndarray, " latents"], Float64[np.ndarray, " latents"]]:
    """log2 of the ratio of rates and its standard error.

    One document's worth of firings at the common rate, dealt out by tokens, is added to the two sides: nothing
    seen gives a ratio of 1, and one document on one side does not give an infinite one.
    """
    fired = np.maximum(a.documents + b.documents, 1)
    size, square = (a.firings + b.firings) / fired, (a.squares + b.squares) / fired
    part = a.tokens / (a.tokens + b.tokens)
    in_a, in_b = a.firings + size * part, b.firings + size * (1 - part)
    alive = in_a > 0
    safe_a, safe_b = np.where(alive, in_a, 1.0), np.where(alive, in_b, 1.0)
    ratio = np.log2((safe_a / a.tokens) / (safe_b / b.tokens))
    variance = (spreads[0] + square * part) / safe_a**2 + (spreads[1] + square * (1 - part)) / safe_b**2
    return np.where(alive, ratio, 0.0), np.sqrt(variance) / np.log(2)
