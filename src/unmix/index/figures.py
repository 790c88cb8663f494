"""Stored figures of one coder's latents, read from `statistics/` on first use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Integer

from unmix.core.errors import ConfigError, CorruptError, did_you_mean
from unmix.index.layout import IndexMeta, RoleFilter, open_raw, role_ids
from unmix.index.statistics import fields, figure_paths
from unmix.index.store import PostingStore

RANKINGS = ("frequency", "max", "mean", "firings")
WEAK, STRONG = 0.5, 0.9
"""Shares of the strength on one token from which a latent counts as a weak or a strong single-token latent."""


@dataclass(frozen=True)
class SliceFigures:
    """Latents by the values of one partition of the positions: the roles, or a slicing. V values, F latents."""

    values: tuple[str, ...]
    """Names of the values."""
    firings: Int64[np.ndarray, "latents values"]
    sum: Float64[np.ndarray, "latents values"]
    """Sum of the activations, signs kept."""
    documents: Int64[np.ndarray, "latents values"]
    """Documents in which the latent fires at a position of the value."""
    tokens: Int64[np.ndarray, " values"]
    """Unmasked positions."""
    n_documents: Int64[np.ndarray, " values"]
    """Documents with an unmasked position of the value."""
    squares: Int64[np.ndarray, "latents values"]
    """Σ over documents of (firings in it, at positions of the value)²."""
    cross: Int64[np.ndarray, "latents values"]
    """Σ over documents of firings × unmasked positions, both of the value."""
    token_squares: Int64[np.ndarray, " values"]
    """Σ over documents of (unmasked positions of the value)²: with the two above, the variance of a token rate over
    documents is `squares − 2 r cross + r² token_squares`."""

    @property
    def frequency(self) -> Float64[np.ndarray, "latents values"]:
        """Share of the value's unmasked positions on which each latent fires; 0 where it has none."""
        return self.firings / np.maximum(self.tokens, 1)

    @property
    def mean(self) -> Float64[np.ndarray, "latents values"]:
        """Mean activation where the latent fires; 0 where it never does."""
        return self.sum / np.maximum(self.firings, 1)


class Figures:
    """Arrays with one row per latent, of the stored values. Sums, means and moments keep signs.

    What speaks of *strength* goes by |value|: `max`, `min`, quantiles, histogram, top tokens. Arrays of many columns
    are memory maps in the type they are stored in.
    """

    def __init__(self, postings: PostingStore, meta: IndexMeta) -> None:
        self._postings, self._meta = postings, meta

    def _load(self, name: str) -> Any:
        dtype, shape = fields(self._postings.n_latents, self._meta)[name]
        path = figure_paths(self._postings.folder, self._meta)[name]
        if not path.is_file():
            raise CorruptError(f"{path}: missing; `unmix index repair` derives the statistics anew")
        return open_raw(path, dtype, shape)

    def _wide(self, name: str) -> Any:
        return np.asarray(self._load(name), np.int64)

    @cached_property
    def firings(self) -> Int64[np.ndarray, " latents"]:
        """Firings over all roles."""
        return self._wide("firings")

    @property
    def firings_by_role(self) -> Int64[np.ndarray, "latents roles"]:
        """Firings in each role."""
        return self.in_roles.firings

    @property
    def slicings(self) -> tuple[str, ...]:
        """Names of the slicings."""
        return tuple(self._meta.slices)

    @cached_property
    def in_roles(self) -> SliceFigures:
        """The figures by role."""
        return self._partition("roles", self._meta.roles)

    def in_slice(self, name: str) -> SliceFigures:
        """The figures by the values of a slicing; `ConfigError` naming those there are. "role" gives the roles."""
        if name not in self._slices:
            if name == "role":
                return self.in_roles
            if name not in self._meta.slices:
                raise ConfigError(
                    f"no slicing {name!r} in this index. {did_you_mean(name, ('role', *self._meta.slices))}"
                )
            self._slices[name] = self._partition(f"slice-{name}", self._meta.slices[name])
        return self._slices[name]

    @cached_property
    def _slices(self) -> dict[str, SliceFigures]:
        return {}

    def _partition(self, name: str, values: tuple[str, ...]) -> SliceFigures:
        totals = np.array(self._load(f"{name}.totals"))
        return SliceFigures(
            values, self._wide(f"{name}.firings"), self._load(f"{name}.sum"), self._wide(f"{name}.documents"),
            totals[:-1, 0], totals[:-1, 1], self._load(f"{name}.squares"), self._load(f"{name}.cross"), totals[:-1, 2],
        )  # fmt: skip

    @cached_property
    def whole(self) -> SliceFigures:
        """The figures over everything, as the one value "all"."""
        totals = np.array(self._load("roles.totals"))[-1:]
        columns = (self.firings, self.sum, self.documents, self._load("squares"), self._load("cross"))
        firings, sums, documents, squares, cross = (column[:, None] for column in columns)
        return SliceFigures(
            ("all",), firings, sums, documents, totals[:, 0], totals[:, 1], squares, cross, totals[:, 2]
        )

    @cached_property
    def place_totals(self) -> Int64[np.ndarray, " 16"]:
        """Unmasked positions by sixteenth of the context."""
        return self._load("place_totals")

    @cached_property
    def documents(self) -> Int64[np.ndarray, " latents"]:
        """Documents in which each latent fires."""
        return self._wide("documents")

    @cached_property
    def n_documents(self) -> int:
        """Documents with an unmasked position."""
        return int(self._load("roles.totals")[-1, 1])

    @cached_property
    def frequency(self) -> Float64[np.ndarray, " latents"]:
        """Share of the unmasked positions on which each latent fires, over all roles."""
        return self.firings / max(sum(self._meta.counted), 1)

    def frequency_in(self, role: RoleFilter) -> Float64[np.ndarray, " latents"]:
        """The same over one role or several."""
        ids = role_ids(self._meta.roles, role)
        if ids is None:
            return self.frequency
        counted = sum(self._meta.counted[i] for i in ids)
        return self.firings_by_role[:, ids].sum(axis=1) / max(counted, 1)

    @cached_property
    def max(self) -> Float32[np.ndarray, " latents"]:
        """Largest |activation|, as it was before rounding; 0 for a latent that never fires."""
        return np.asarray(self._postings.scale)

    @property
    def min(self) -> Float32[np.ndarray, " latents"]:
        """Smallest |activation| of a firing; 0 for a latent that never fires."""
        return self.quantiles[:, 0]

    @cached_property
    def extremes(self) -> Float32[np.ndarray, "latents 2"]:
        """Lowest and highest activation, signs kept; 0 and 0 for a latent that never fires."""
        return self._load("extremes")

    @cached_property
    def sum(self) -> Float64[np.ndarray, " latents"]:
        """Sum of the activations."""
        return self._load("sum")

    @cached_property
    def strength(self) -> Float64[np.ndarray, " latents"]:
        """Sum of the |activations|."""
        return self._load("strength")

    @cached_property
    def mean(self) -> Float64[np.ndarray, " latents"]:
        """Mean activation where the latent fires; 0 for a latent that never does."""
        return self.sum / np.maximum(self.firings, 1)

    @cached_property
    def mean_square(self) -> Float64[np.ndarray, " latents"]:
        """Mean squared activation where the latent fires."""
        return self._central(0) + self.mean**2

    @cached_property
    def std(self) -> Float64[np.ndarray, " latents"]:
        """Standard deviation (ddof 0) of the activation where the latent fires."""
        return np.sqrt(self._central(0))

    @cached_property
    def skew(self) -> Float64[np.ndarray, " latents"]:
        """Third standardised moment (ddof 0) of the activation where the latent fires; 0 where it never varies."""
        return self._standardised(1, 1.5)

    @cached_property
    def kurtosis(self) -> Float64[np.ndarray, " latents"]:
        """Fourth standardised moment less 3 (0 for a normal distribution); 0 where the activation never varies."""
        return np.where(self._varies, self._standardised(2, 2.0) - 3, 0)

    def _central(self, order: int) -> Float64[np.ndarray, " latents"]:
        return self._load("moments")[:, order] / np.maximum(self.firings, 1)

    @property
    def _varies(self) -> Bool[np.ndarray, " latents"]:
        # What rounding leaves of equal values: their mean is off by 2^-53 or so.
        return self._central(0) > (2.0**-48 * self.mean) ** 2

    def _standardised(self, order: int, power: float) -> Float64[np.ndarray, " latents"]:
        scale = np.where(self._varies, self._central(0), 1.0) ** power
        return np.where(self._varies, self._central(order) / scale, 0)

    @cached_property
    def quantiles(self) -> Float32[np.ndarray, "latents 11"]:
        """Strengths at the ranks `statistics.RANKS` (percent) of the firings; 0 for a latent that never fires.

        Of n strengths in order, the one at `rank · (n − 1) // 100`: exact, each is a strength that occurs.
        """
        return self._load("quantiles")

    @cached_property
    def histogram(self) -> Integer[np.ndarray, "latents 64"]:
        """Firings by log2 strength; edges: `statistics.histogram_edges()`."""
        return self._load("histogram")

    @cached_property
    def places(self) -> Integer[np.ndarray, "latents 16"]:
        """Firings by sixteenth of the context (a shorter context fills its first bins only)."""
        return self._load("places")

    @cached_property
    def top_token_ids(self) -> Integer[np.ndarray, "latents 10"]:
        """The ten tokens with the largest summed strength; -1 where there are fewer."""
        return self._load("top_token_ids")

    @cached_property
    def top_token_sums(self) -> Float64[np.ndarray, "latents 10"]:
        """Summed strength on each of those tokens."""
        return self._load("top_token_sums")

    @cached_property
    def top_token_counts(self) -> Integer[np.ndarray, "latents 10"]:
        """Firings on each of those tokens."""
        return self._load("top_token_counts")

    @cached_property
    def frequent_token_ids(self) -> Integer[np.ndarray, "latents 10"]:
        """The ten tokens with the most firings; -1 where there are fewer."""
        return self._load("frequent_token_ids")

    @cached_property
    def frequent_token_sums(self) -> Float64[np.ndarray, "latents 10"]:
        """Summed strength on each of those tokens."""
        return self._load("frequent_token_sums")

    @cached_property
    def frequent_token_counts(self) -> Integer[np.ndarray, "latents 10"]:
        """Firings on each of those tokens."""
        return self._load("frequent_token_counts")

    @cached_property
    def single_token_share(self) -> Float64[np.ndarray, " latents"]:
        """Share of the strength that lies on the first top token; 0 for a latent that never fires."""
        return self.top_token_sums[:, 0] / np.where(self.strength > 0, self.strength, 1.0)

    @property
    def single_token_weak(self) -> Bool[np.ndarray, " latents"]:
        """Latents with at least half of their strength on one token."""
        return self.single_token_share >= WEAK

    @property
    def single_token_strong(self) -> Bool[np.ndarray, " latents"]:
        """Latents with at least nine tenths of their strength on one token."""
        return self.single_token_share >= STRONG

    @cached_property
    def co_firing_ids(self) -> Int32[np.ndarray, "latents 64"]:
        """The latents that fire at the same positions, by Jaccard index (`co_firing.py`); -1 where there are fewer."""
        return self._load("co_firing_ids")

    @cached_property
    def co_firing_jaccard(self) -> Float32[np.ndarray, "latents 64"]:
        """The Jaccard index with each of those; 0 where there are fewer."""
        return self._load("co_firing_jaccard")

    @cached_property
    def alive(self) -> Bool[np.ndarray, " latents"]:
        """Which latents fire at all."""
        return self.firings > 0

    def ranking(self, by: str) -> Int64[np.ndarray, " latents"]:
        """Latent ids, largest first; ties by id. `by`: one of `RANKINGS`."""
        if by not in RANKINGS:
            raise ConfigError(f"cannot rank latents by {by!r}. {did_you_mean(by, RANKINGS)}")
        values = {"frequency": self.firings, "firings": self.firings, "max": self.max, "mean": self.mean}[by]
        return np.argsort(-values.astype(np.float64), kind="stable")
