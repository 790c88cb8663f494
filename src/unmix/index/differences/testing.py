"""Tests of two shares and two rates at the level of documents, and the false-discovery rate, in NumPy alone.

Tokens of one document are not independent: a latent that fires for a topic fires dozens of times in the few
documents that have it, and a test that counts tokens finds "differences" between two halves of one corpus. So
everything here counts documents, or sums over documents with the variance that documents have.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, Int64, Num

EXACT_BELOW = 20.0
"""Fisher's exact test where the smallest expected cell of the 2 × 2 table is below this; the normal one above."""

_SMALL = np.array([math.lgamma(n + 1) for n in range(16)])


def log_factorial(n: Num[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """ln n! of whole numbers: a table below 16, Stirling's series above (relative error below 1e-14)."""
    x = np.maximum(n, 15).astype(np.float64) + 1
    inverse = 1 / x
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    stirling = (x - 0.5) * np.log(x) - x + 0.5 * math.log(2 * math.pi) + series
    return np.where(n < 16, _SMALL[np.clip(n, 0, 15).astype(np.int64)], stirling)


def normal_p(z: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Two-sided p-values of standard normal deviates; 0 beyond 38."""
    return np.array([math.erfc(abs(one) / math.sqrt(2)) for one in z.tolist()], np.float64)


def fisher_p(
    fired_a: Int64[np.ndarray, " n"], total_a: int, fired_b: Int64[np.ndarray, " n"], total_b: int
) -> Float64[np.ndarray, " n"]:
    """Fisher's exact test, two-sided: the probability of all tables no likelier than each of these.

    Tables with the same number of fired documents share one distribution. Of a long one the part is taken that lies
    within 12 standard deviations and 40 documents of its mean, or as far as a table here reaches: what is left out
    has less than 1e-30 of the weight.
    """
    if total_a > total_b:
        fired_a, total_a, fired_b, total_b = fired_b, total_b, fired_a, total_a
    logs = log_factorial(np.arange(total_b + 1))
    fired = fired_a + fired_b
    order = np.argsort(fired, kind="stable")
    kinds, starts = np.unique(fired[order], return_index=True)
    p = np.empty(len(fired))
    ends = np.append(starts[1:], len(order))
    for n, start, end in zip(kinds.tolist(), starts.tolist(), ends.tolist(), strict=False):
        members = order[start:end]
        here = fired_a[members]
        mean = n * total_a / (total_a + total_b)
        reach = int(12 * math.sqrt(mean) + 40 + mean)
        lowest, highest = max(0, n - total_b), min(n, total_a, max(reach, int(here.max())))
        table = np.arange(lowest, highest + 1)
        weight = -(logs[table] + logs[total_a - table] + logs[n - table] + logs[total_b - n + table])
        ranked = np.sort(weight)
        below = np.cumsum(np.exp(ranked - ranked[-1]))
        p[members] = below[np.searchsorted(ranked, weight[here - lowest] + 1e-7, side="right") - 1] / below[-1]
    return np.minimum(p, 1.0)


def share_p(
    fired_a: Int64[np.ndarray, " n"], total_a: int, fired_b: Int64[np.ndarray, " n"], total_b: int
) -> Float64[np.ndarray, " n"]:
    """Two-sided p-values of "the same share of documents on both sides": exact where counts are small."""
    total, fired = total_a + total_b, fired_a + fired_b
    smallest = np.minimum(fired, total - fired) * (min(total_a, total_b) / total)
    pooled = fired / total
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.sqrt(pooled * (1 - pooled) * (1 / total_a + 1 / total_b))
        p = normal_p(np.where(deviation > 0, (fired_a / total_a - fired_b / total_b) / deviation, 0.0))
    few = np.flatnonzero(smallest < EXACT_BELOW)
    p[few] = fisher_p(fired_a[few], total_a, fired_b[few], total_b)
    return p


def rate_p(
    difference: Float64[np.ndarray, " n"],
    spreads: tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]],
    common: Float64[np.ndarray, " n"],
    tokens: tuple[int, int],
    token_squares: tuple[int, int],
) -> Float64[np.ndarray, " n"]:
    """Two-sided p-values of "the same rate of firings a token", by the spread between documents.

    A spread is Σ over documents of (firings − rate · tokens)², which makes the variance of a rate right however
    firings cluster inside documents (Cochran, Sampling Techniques, §6.3). `spreads` are about each side's own rate,
    `common` is of all documents about the common one. A few documents that happen to lack a strong cluster
    understate their side's spread; so the common one, dealt out to the sides by tokens or by squared tokens (few
    firings a document, or many), counts where it gives the larger variance.
    """
    a, b = tokens
    variance = spreads[0] / a**2 + spreads[1] / b**2
    for one, other in (tokens, token_squares):
        share = one / (one + other)
        variance = np.maximum(variance, common * (share / a**2 + (1 - share) / b**2))
    with np.errstate(invalid="ignore", divide="ignore"):
        z = difference / np.sqrt(variance)
    return normal_p(np.where(np.isfinite(z), z, 0.0))


def q_values(p: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Benjamini and Hochberg's (1995): taking all with q ≤ x has an expected share of false ones of at most x."""
    n = len(p)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * n / np.arange(1, n + 1)
    q = np.empty(n)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def cohen_h(share_a: Float64[np.ndarray, " n"], share_b: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Cohen's h of two shares: 0.2 is a small difference, 0.5 a medium one, 0.8 a large one."""
    return 2 * np.arcsin(np.sqrt(share_a)) - 2 * np.arcsin(np.sqrt(share_b))
