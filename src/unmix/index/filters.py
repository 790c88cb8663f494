"""Which positions a read may show: by role, by the values of slicings, by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64

from unmix.core.errors import ConfigError, did_you_mean
from unmix.index.documents import DocumentIds, ranges
from unmix.index.layout import IndexMeta, RoleFilter, role_ids
from unmix.index.shared import SharedStore

Where = Mapping[str, str | Sequence[str]] | None
"""Slicing → one of its values or several: `{"speaker": "assistant"}`. A position must fit every slicing named."""
Documents = DocumentIds | None
"""One document id, several, or None for all."""


@dataclass(frozen=True, eq=False)
class Filter:
    """Roles and documents choose whole contexts first; `where` and documents then choose positions."""

    store: SharedStore
    roles: tuple[int, ...] | None = None
    where: tuple[tuple[str, tuple[int, ...]], ...] = ()
    documents: Int64[np.ndarray, " documents"] | None = None

    @cached_property
    def contexts(self) -> Int64[np.ndarray, " n"]:
        """Contexts in which a position may fit, ascending: of the roles, and holding one of the documents."""
        pool = self.store.contexts_of(None if self.roles is None else [self.store.roles[i] for i in self.roles])
        if self.documents is None:
            return pool
        held = self._document_contexts
        return held[np.isin(self.store.role_of[held], self.roles)] if self.roles is not None else held

    @cached_property
    def _document_contexts(self) -> Int64[np.ndarray, " n"]:
        assert self.documents is not None
        starts, ends = self.store.document_table.stretches(self.documents)
        return np.unique(ranges(starts // self.store.context, (ends - 1) // self.store.context + 1))

    @property
    def everywhere(self) -> bool:
        """Whether every context may hold a position that fits."""
        return self.roles is None and self.documents is None

    def keeps_contexts(self, contexts: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which contexts are of the roles, and hold one of the documents."""
        if self.documents is not None:
            return np.isin(contexts, self.contexts)
        if self.roles is None:
            return np.ones(len(contexts), bool)
        return self._role_fits[self.store.role_of[contexts]]

    def keeps(self, positions: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which positions fit; whether they are masked is not looked at."""
        keep = np.ones(len(positions), bool)
        if self.roles is not None:
            keep &= self._role_fits[self.store.role_of[positions // self.store.context]]
        for name, fits in self._fits.items():
            keep &= fits[self.store.slices[name].reshape(-1)[positions]]
        if self.documents is not None:
            keep &= np.isin(self.store.documents.reshape(-1)[positions], self.documents)
        return keep

    def keeps_places(self, contexts: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, "n context"]:
        """Which places of some contexts fit and are unmasked."""
        places = self.store.mask(contexts)
        places &= self.keeps_contexts(contexts)[:, None]
        for name, fits in self._fits.items():
            places &= fits[self.store.slices[name][contexts]]
        if self.documents is not None:
            places &= np.isin(self.store.documents[contexts], self.documents)
        return places

    def without_positions(self) -> Filter:
        """The same roles, any position."""
        return Filter(self.store, self.roles)

    @cached_property
    def _role_fits(self) -> Bool[np.ndarray, " roles"]:
        fits = np.zeros(len(self.store.roles), bool)
        fits[list(self.roles or ())] = True
        return fits

    @cached_property
    def _fits(self) -> dict[str, Bool[np.ndarray, " 256"]]:
        tables = {name: np.zeros(256, bool) for name, _ in self.where}
        for name, numbers in self.where:
            tables[name][list(numbers)] = True
        return tables


def make_filter(
    store: SharedStore, role: RoleFilter = None, where: Where = None, documents: Documents = None
) -> Filter:
    """A filter; `ConfigError` naming the nearest for a role, slicing, value or document that does not exist."""
    roles = role_ids(store.roles, role)
    values = tuple((name, _numbers(store.meta, name, wanted)) for name, wanted in (where or {}).items())
    ids = None
    if documents is not None:
        ids = store.document_table.ids[store.document_table.rows(documents)]
    return Filter(store, None if roles is None else tuple(roles), values, ids)


def _numbers(meta: IndexMeta, name: str, wanted: str | Sequence[str]) -> tuple[int, ...]:
    if name not in meta.slices:
        known = did_you_mean(name, meta.slices) if meta.slices else "This index has none."
        raise ConfigError(f"unknown slicing {name!r}. {known}")
    known_values = meta.slices[name]
    values = [wanted] if isinstance(wanted, str) else list(wanted)
    for value in values:
        if value not in known_values:
            raise ConfigError(f"slicing {name!r} has no value {value!r}. {did_you_mean(value, known_values)}")
    return tuple(sorted({known_values.index(value) for value in values}))
