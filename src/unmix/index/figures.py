"""Stored figures of one coder's latents, read from `statistics/` on first use."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.layout import IndexMeta, RoleFilter, open_raw, role_ids
from unmix.index.statistics import fields, figure_paths
from unmix.index.store import PostingStore

RANKINGS = ("frequency", "max", "mean", "firings")


class Figures:
    """Arrays with one row per latent. Sums and means keep signs; `max` and the histogram go by |value|."""

    def __init__(self, postings: PostingStore, meta: IndexMeta) -> None:
        self._postings, self._meta = postings, meta

    def _load(self, name: str) -> Any:
        dtype, shape = fields(self._postings.n_latents, len(self._meta.roles))[name]
        return open_raw(figure_paths(self._postings.folder)[name], dtype, shape)

    @cached_property
    def firings_by_role(self) -> Int64[np.ndarray, "latents roles"]:
        """Firings in each role."""
        return self._load("firings")

    @cached_property
    def firings(self) -> Int64[np.ndarray, " latents"]:
        """Firings over all roles."""
        return self.firings_by_role.sum(axis=1)

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
        """Largest |activation|; 0 for a latent that never fires."""
        return np.asarray(self._postings.scale)

    @cached_property
    def sum(self) -> Float64[np.ndarray, " latents"]:
        """Sum of the activations."""
        return self._load("sum")

    @cached_property
    def mean(self) -> Float64[np.ndarray, " latents"]:
        """Mean activation where the latent fires; 0 for a latent that never does."""
        return self.sum / np.maximum(self.firings, 1)

    @cached_property
    def std(self) -> Float64[np.ndarray, " latents"]:
        """Standard deviation (ddof 0) of the activation where the latent fires."""
        square = self._load("sum_squares") / np.maximum(self.firings, 1)
        return np.sqrt(np.maximum(square - self.mean**2, 0))

    @cached_property
    def histogram(self) -> Int64[np.ndarray, "latents 64"]:
        """Firings by log2 strength; edges: `statistics.histogram_edges()`."""
        return self._load("histogram")

    @cached_property
    def places(self) -> Int64[np.ndarray, "latents 16"]:
        """Firings by sixteenth of the context (a shorter context fills its first bins only)."""
        return self._load("places")

    @cached_property
    def top_token_ids(self) -> Int64[np.ndarray, "latents 10"]:
        """The ten tokens with the largest summed strength; -1 where there are fewer."""
        return self._load("top_token_ids")

    @cached_property
    def top_token_sums(self) -> Float64[np.ndarray, "latents 10"]:
        """Summed strength on each of those tokens."""
        return self._load("top_token_sums")

    @cached_property
    def top_token_counts(self) -> Int64[np.ndarray, "latents 10"]:
        """Firings on each of those tokens."""
        return self._load("top_token_counts")

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
