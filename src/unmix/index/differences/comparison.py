"""`diff`: which latents fire more on one side than on the other, from stored statistics alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.differences.evidence import Evidence, weigh
from unmix.index.differences.pairing import check_coders, remarks
from unmix.index.differences.sides import Side, Where, read_side
from unmix.index.differences.witnesses import window_facts, witnesses
from unmix.index.reader import LatentIndex, open_index
from unmix.index.windows import Window

ORDERS = ("q", "effect")


@dataclass(frozen=True, eq=False)
class LatentDifference:
    """One latent on both sides; `more` names the side on which it is commoner."""

    latent: int
    more: str
    firings: tuple[int, int]
    documents: tuple[int, int]
    rate: tuple[float, float]
    """Firings a token."""
    share: tuple[float, float]
    """Share of the documents in which it fires."""
    mean: tuple[float, float]
    """Mean activation where it fires."""
    log2_ratio: float
    """log2 of the ratio of rates, drawn towards 0 by one document's worth of firings."""
    interval: tuple[float, float]
    """95 % interval of the ratio, by the spread between documents; from a few dozen of them it is somewhat narrow."""
    share_difference: float
    cohen_h: float
    p_share: float
    p_rate: float
    p: float
    q: float
    """NaN where the latent was not tested."""
    top_tokens: list[str]
    witnesses: list[Window] = field(default_factory=list[Window])
    """Windows of different documents in which it fires, on the side that has more of it."""

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "witnesses"}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
        return {**plain, "witnesses": [window_facts(one) for one in self.witnesses]}


@dataclass(frozen=True, eq=False)
class Difference:
    """The comparison of every latent: `evidence` has one entry a latent, in order of id."""

    a: Side
    b: Side
    evidence: Evidence
    min_documents: int
    q_below: float
    remarks: list[str]
    """What a reader has to know: the same text on both sides, documents of other lengths, other coders."""

    @property
    def n_tested(self) -> int:
        """Latents with enough evidence to be tested: the number that the q-values correct for."""
        return int(self.evidence.tested.sum())

    @property
    def found(self) -> Int64[np.ndarray, " n"]:
        """Ids of the latents with q at most `q_below`, ascending."""
        return np.flatnonzero(self.evidence.tested & (np.nan_to_num(self.evidence.q, nan=1.0) <= self.q_below))

    def ranking(self, by: str = "q") -> Int64[np.ndarray, " n"]:
        """The found latents, by q-value (then by the ratio) or by "effect": the end of the interval nearest to 0."""
        if by not in ORDERS:
            raise ConfigError(f"cannot sort by {by!r}. {did_you_mean(by, ORDERS)}")
        found = self.found
        seen = self.evidence
        ratio = np.abs(seen.log2_ratio[found])
        if by == "q":
            return found[np.lexsort((found, -ratio, seen.p[found]))]
        certain = np.maximum(np.maximum(seen.low[found], -seen.high[found]), 0)
        return found[np.lexsort((found, -ratio, -certain))]

    def top(self, n: int = 20, by: str = "q", n_witnesses: int = 3) -> list[LatentDifference]:
        """The `n` foremost of the found latents, with their windows: reads the postings of these latents only."""
        return [self.latent(int(i), n_witnesses) for i in self.ranking(by)[:n]]

    def latent(self, i: int, n_witnesses: int = 3) -> LatentDifference:
        """One latent, tested or not."""
        a, b, seen = self.a.counts, self.b.counts, self.evidence
        more = self.a if seen.log2_ratio[i] >= 0 else self.b
        tokens = more.coder[i].top_tokens(5)
        return LatentDifference(
            i, more.name, (int(a.firings[i]), int(b.firings[i])), (int(a.documents[i]), int(b.documents[i])),
            (float(a.rate[i]), float(b.rate[i])), (float(a.share[i]), float(b.share[i])),
            (float(a.mean[i]), float(b.mean[i])), float(seen.log2_ratio[i]), (float(seen.low[i]), float(seen.high[i])),
            float(a.share[i] - b.share[i]), float(seen.cohen_h[i]), float(seen.p_share[i]), float(seen.p_rate[i]),
            float(seen.p[i]), float(seen.q[i]),
            [f"<{t.token}>" if t.string is None else t.string for t in tokens], witnesses(more, i, n_witnesses),
        )  # fmt: skip

    def facts(self, n: int = 20, by: str = "q", n_witnesses: int = 3) -> dict[str, Any]:
        """Everything about the `n` foremost, fit for JSON."""
        return {
            "a": self.a.facts(), "b": self.b.facts(), "n_latents": len(self.evidence.tested), "tested": self.n_tested,
            "min_documents": self.min_documents, "q_below": self.q_below, "found": len(self.found),
            "remarks": self.remarks, "latents": [one.facts() for one in self.top(n, by, n_witnesses)],
        }  # fmt: skip


def diff(
    a: LatentIndex | str | Path,
    b: LatentIndex | str | Path | None = None,
    *,
    slice: str | None = None,
    against: str | None = None,
    coder: str | None = None,
    coder_b: str | None = None,
    q: float = 0.05,
    min_documents: int = 10,
) -> Difference:
    """Compare every latent between two indexes, or between two slices of one.

    Args:
        b: the other index; None to compare two slices of `a`.
        slice: `NAME=VALUE`, the positions of `a` that count: a slicing of the index, or `role=…`.
        against: the same for `b` (default with two indexes: as `slice`); needed with one index.
        coder: name of the coder where an index has several; `coder_b`: of the second index, where it differs.
        q: latents with a q-value of at most this are found: the expected share of false ones among them.
        min_documents: latents that fire in fewer documents, both sides together, are not tested.

    Raises:
        ConfigError: coders that cannot be compared, slices that do not exist, a side without any position.
    """
    if not 0 < q <= 1:
        raise ConfigError(f"q is {q}, expected more than 0 and at most 1")
    if min_documents < 1:
        raise ConfigError(f"min_documents is {min_documents}, expected at least 1")
    first = a if isinstance(a, LatentIndex) else open_index(a)
    second = first if b is None else b if isinstance(b, LatentIndex) else open_index(b)
    if b is None and (slice is None or against is None):
        raise ConfigError("one index is compared with itself by two slices: give both `slice` and `against`")
    against = slice if against is None else against
    one, other = _sides(first, second, slice, against, coder, coder_b or coder)
    evidence = weigh(one.counts, other.counts, min_documents)
    return Difference(one, other, evidence, min_documents, q, remarks(one, other))


def _sides(
    first: LatentIndex, second: LatentIndex, one: str | None, other: str | None, coder: str | None, coder_b: str | None
) -> tuple[Side, Side]:
    places = [None if text is None else Where.parse(text, index) for text, index in ((one, first), (other, second))]
    coders = [first.coder(coder), second.coder(coder_b)]
    if first.folder == second.folder and places[0] == places[1] and coders[0].name == coders[1].name:
        raise ConfigError("both sides are the same positions of the same index: there is nothing to compare")
    check_coders(first, coders[0], second, coders[1])
    names = [str(place) for place in places]
    if names[0] == names[1]:
        names = [str(first.folder), str(second.folder)] if first.folder != second.folder else [c.name for c in coders]
    a = read_side(first, coders[0], places[0], names[0])
    return a, read_side(second, coders[1], places[1], names[1])
