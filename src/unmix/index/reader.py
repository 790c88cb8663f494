"""Opening an index: `open_index(folder)` → `LatentIndex` → `CoderIndex` → `Latent`. Needs NumPy, no model."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Integer

from unmix.core.config import semantic_hash
from unmix.core.errors import ConfigError, CorruptError, did_you_mean
from unmix.core.manifest import MANIFEST, Problem, require_whole, verify_folder
from unmix.index.documents import DocumentIds, DocumentTable
from unmix.index.figures import Figures
from unmix.index.filters import Documents, Where, make_filter
from unmix.index.forward import Forward, PositionCodes, open_forward
from unmix.index.latent import Latent
from unmix.index.layout import KIND, CoderEntry, IndexMeta, RoleFilter
from unmix.index.queries import (
    OCCURRENCES,
    LatentHit,
    Token,
    check_order,
    positions_in,
    positions_of,
    rows_at,
    tally,
    token_ids,
)
from unmix.index.shared import SharedStore
from unmix.index.store import PostingStore


def open_index(folder: str | Path) -> LatentIndex:
    """Open an index folder, memory-mapped: costs milliseconds whatever its size.

    Raises:
        CorruptError: no whole index at `folder`, or a file missing or of another length, named. Hashes are
            checked by `LatentIndex.verify()`, for that reads everything.
    """
    folder = Path(folder)
    try:
        manifest = require_whole(folder, KIND)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{folder / MANIFEST}: not a manifest ({error!r})") from error
    return LatentIndex(folder, IndexMeta.read(folder), semantic_hash(manifest["files"]))


@dataclass(frozen=True)
class TokenHit:
    """A latent among whose ten top tokens a token is."""

    coder: str
    latent: int
    rank: int
    """0 where it is the latent's first token."""
    sum: float
    """Summed strength of the latent on the token."""
    count: int


class CoderIndex:
    """One coder's latents. Arrays have one entry per latent, over all roles."""

    def __init__(self, name: str, entry: CoderEntry, store: SharedStore, meta: IndexMeta) -> None:
        self.name, self.n_latents = name, entry.n_latents
        self.n_tokens = meta.n_tokens
        self._store, self._entry = store, entry
        self._postings = PostingStore(store.folder, meta, entry)
        self.figures = Figures(self._postings, meta)

    def __len__(self) -> int:
        return self.n_latents

    def __repr__(self) -> str:
        return f"<coder index {self.name!r}: {self.n_latents} latents over {self.n_tokens} tokens>"

    def __getitem__(self, latent: SupportsIndex) -> Latent:
        """One latent, by id; `ConfigError` where there is none."""
        i = operator.index(latent)
        if not 0 <= i < self.n_latents:
            raise ConfigError(f"no latent {i} in {self.name!r}: it has latents 0 to {self.n_latents - 1}")
        return Latent(self.name, i, self._store, self._postings, self.figures)

    def __iter__(self) -> Iterator[Latent]:
        return (self[i] for i in range(self.n_latents))

    @property
    def frequency(self) -> Float64[np.ndarray, " latents"]:
        """Share of the unmasked positions on which each latent fires."""
        return self.figures.frequency

    @property
    def max(self) -> Float32[np.ndarray, " latents"]:
        """Largest |activation| of each latent."""
        return self.figures.max

    @property
    def mean(self) -> Float64[np.ndarray, " latents"]:
        """Mean activation of each latent where it fires."""
        return self.figures.mean

    @property
    def alive(self) -> Bool[np.ndarray, " latents"]:
        """Which latents fire at all."""
        return self.figures.alive

    @property
    def stats(self) -> dict[str, np.ndarray]:
        """Every stored or derived figure, by name."""
        names = (
            "firings", "firings_by_role", "frequency", "max", "sum", "mean", "std", "histogram", "places",
            "top_token_ids", "top_token_sums", "top_token_counts", "alive",
        )  # fmt: skip
        return {name: getattr(self.figures, name) for name in names}

    def ranking(self, by: str = "max") -> Int64[np.ndarray, " latents"]:
        """Latent ids by "max", "frequency", "mean" or "firings", largest first; ties by id."""
        return self.figures.ranking(by)

    def search_token(self, token_id: int) -> list[TokenHit]:
        """Latents among whose ten top tokens `token_id` is, by summed strength on it, strongest first."""
        if token_id < 0:
            raise ConfigError(f"token id {token_id} is out of range: it must be 0 or more")
        latents, ranks = np.nonzero(self.figures.top_token_ids == token_id)
        sums = self.figures.top_token_sums[latents, ranks]
        counts = self.figures.top_token_counts[latents, ranks]
        return [
            TokenHit(self.name, int(latents[i]), int(ranks[i]), float(sums[i]), int(counts[i]))
            for i in np.argsort(-sums, kind="stable")
        ]

    @cached_property
    def forward(self) -> Forward:
        """Position → latents, beside the index; made on first use (about a minute for 100 M firings), then kept."""
        return open_forward(self._store, self._postings, self._entry)

    def codes_of(self, contexts: Int64[np.ndarray, " contexts"] | Sequence[int]) -> PositionCodes:
        """Latents and values of every position of some contexts, one row a position, in the order given."""
        return self.forward.codes_of(np.asarray(contexts, np.int64))

    def latents_on(
        self,
        token: Token,
        role: RoleFilter = None,
        *,
        where: Where = None,
        documents: Documents = None,
        by: str = "sum",
        n: int | None = None,
        occurrences: int | None = OCCURRENCES,
    ) -> list[LatentHit]:
        """All latents that fire on a token, or on any of several: by id or exact string (`" Paris"`).

        Args:
            by: "sum" (of strengths there), "count", "mean", "max" or "lift" (over the latent's own frequency).
            n: how many of them, the first ones; None for all.
            occurrences: of a more frequent token, the size of the uniform sample of its positions that is looked at;
                None for every position.
        """
        check_order(by, n)
        keep = make_filter(self._store, role, where, documents)
        positions = positions_of(self._store, token_ids(self._store, token), keep, occurrences)
        return self._hits(positions, by, n)

    def by_document(self, document: DocumentIds, *, by: str = "sum", n: int | None = None) -> list[LatentHit]:
        """The latents that fire in a document, or in several taken together. `by`, `n` as in `latents_on`."""
        return self._hits(positions_in(self._store, *self._store.document_table.stretches(document)), by, n)

    def by_position(self, position: int, *, by: str = "sum", n: int | None = None) -> list[LatentHit]:
        """The latents that fire at one global position, strongest first."""
        return self._hits(np.array([position], np.int64), by, n)

    def _hits(self, positions: Int64[np.ndarray, " n"], by: str, n: int | None) -> list[LatentHit]:
        check_order(by, n)
        found = tally(rows_at(self.forward, positions), self.n_latents)
        return found.hits(self.name, self.frequency, by, n)


class LatentIndex:
    """An open index: `index[name]` is a coder, `index[i]` a latent where there is one coder."""

    def __init__(self, folder: Path, description: IndexMeta, hash: str) -> None:
        self.folder, self.hash = folder, hash
        """16 hex digits over the content of every file: the same content has the same hash."""
        self.description = description
        self.meta = description.meta
        self.roles, self.context = description.roles, description.context
        self.n_contexts, self.n_tokens = description.n_contexts, description.n_tokens
        self.store = SharedStore(folder, description)

    @cached_property
    def coders(self) -> dict[str, CoderIndex]:
        """Every coder, by name."""
        found = self.description.coders.items()
        return {name: CoderIndex(name, entry, self.store, self.description) for name, entry in found}

    @property
    def names(self) -> list[str]:
        """Names of the coders."""
        return list(self.description.coders)

    def __repr__(self) -> str:
        return f"<index {self.folder}: {self.n_tokens} tokens, coders {', '.join(self.names)}>"

    def coder(self, name: str | None = None) -> CoderIndex:
        """A coder by name; without one, the only coder. `ConfigError` naming the nearest or all otherwise."""
        if name is None:
            if len(self.names) != 1:
                raise ConfigError(
                    f"{self.folder} indexes {len(self.names)} coders; name one of {', '.join(self.names)}"
                )
            name = self.names[0]
        if name not in self.coders:
            raise ConfigError(f"no coder {name!r} in {self.folder}. {did_you_mean(name, self.names)}")
        return self.coders[name]

    def __getitem__(self, key: str | SupportsIndex) -> Any:
        """`index[name]` → `CoderIndex`; `index[i]` → `Latent` of the only coder."""
        return self.coder(key) if isinstance(key, str) else self.coder()[key]

    @property
    def tokens(self) -> np.ndarray:
        """Token ids [n_contexts, context]; memory-mapped."""
        return self.store.tokens

    @property
    def documents(self) -> np.ndarray:
        """Document id of each position [n_contexts, context], int32; memory-mapped."""
        return self.store.documents

    def mask(self, contexts: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, "n context"]:
        """True where a position of the given contexts counts."""
        return self.store.mask(contexts)

    def contexts_of(self, role: RoleFilter) -> Int64[np.ndarray, " n"]:
        """Ids of the contexts of one role, several, or all (None); ascending."""
        return self.store.contexts_of(role)

    def token_strings(self, ids: Integer[np.ndarray, " n"] | Sequence[int]) -> list[str] | None:
        """Display strings of token ids; None where the index was built without a vocabulary."""
        return self.store.strings(ids)

    def search_token(self, token_id: int, coder: str | None = None) -> list[TokenHit]:
        """Latents among whose ten top tokens `token_id` is, strongest first; of one coder or of all."""
        hits = [hit for one in self._some(coder) for hit in one.search_token(token_id)]
        return sorted(hits, key=lambda hit: -hit.sum)

    def latents_on(
        self, token: Token, coder: str | None = None, role: RoleFilter = None, **options: Any
    ) -> list[LatentHit]:
        """All latents that fire on a token, of one coder or of all; options as `CoderIndex.latents_on`."""
        return [hit for one in self._some(coder) for hit in one.latents_on(token, role, **options)]

    def by_document(self, document: DocumentIds, coder: str | None = None, **options: Any) -> list[LatentHit]:
        """The latents that fire in a document, of one coder or, one after another, of all."""
        return [hit for one in self._some(coder) for hit in one.by_document(document, **options)]

    def by_position(self, position: int, coder: str | None = None, **options: Any) -> list[LatentHit]:
        """The latents that fire at a global position, of one coder or, one after another, of all."""
        return [hit for one in self._some(coder) for hit in one.by_position(position, **options)]

    def _some(self, coder: str | None) -> list[CoderIndex]:
        return list(self.coders.values()) if coder is None else [self.coder(coder)]

    @property
    def documents_table(self) -> DocumentTable:
        """Every document: id, unmasked positions, role, and where it lies. Read once, about 1 s for 100 M positions."""
        return self.store.document_table

    @property
    def stats(self) -> dict[str, Any]:
        """A summary of plain numbers (see `summary.py`)."""
        from unmix.index.summary import summarise

        return summarise(self)

    def verify(self) -> list[Problem]:
        """Hash every file against the manifest; the broken ones, named. Reads everything."""
        return verify_folder(self.folder)
