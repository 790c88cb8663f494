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
from unmix.index.figures import Figures
from unmix.index.latent import Latent
from unmix.index.layout import KIND, CoderEntry, IndexMeta, RoleFilter
from unmix.index.store import PostingStore, TokenStore


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

    def __init__(self, name: str, entry: CoderEntry, store: TokenStore, meta: IndexMeta) -> None:
        self.name, self.n_latents = name, entry.n_latents
        self.n_tokens = meta.n_tokens
        self._store = store
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


class LatentIndex:
    """An open index: `index[name]` is a coder, `index[i]` a latent where there is one coder."""

    def __init__(self, folder: Path, description: IndexMeta, hash: str) -> None:
        self.folder, self.hash = folder, hash
        """16 hex digits over the content of every file: the same content has the same hash."""
        self.description = description
        self.meta = description.meta
        self.roles, self.context = description.roles, description.context
        self.n_contexts, self.n_tokens = description.n_contexts, description.n_tokens
        self.store = TokenStore(folder, description)

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
        coders = [self.coder(coder)] if coder is not None else list(self.coders.values())
        hits = [hit for one in coders for hit in one.search_token(token_id)]
        return sorted(hits, key=lambda hit: -hit.sum)

    @property
    def stats(self) -> dict[str, Any]:
        """A summary of plain numbers (see `summary.py`)."""
        from unmix.index.summary import summarise

        return summarise(self)

    def verify(self) -> list[Problem]:
        """Hash every file against the manifest; the broken ones, named. Reads everything."""
        return verify_folder(self.folder)
