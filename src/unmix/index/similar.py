"""One text index for all latents: which stretches of text are most alike, by BM25 or by a given embedding.

The unit is a *tile*: 32 positions of a context (the last of a context may be shorter). All contexts are tiled up to
about 200,000 tiles; of a larger index a uniform sample of contexts is, the same in every process. The index is kept in
a cache beside the index folder (in a temporary folder where that cannot be written), keyed by the text alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64, Integer

from unmix.core.errors import ConfigError
from unmix.index.cache import Cache, cached
from unmix.index.choosing import shuffled
from unmix.index.documents import ranges
from unmix.index.layout import open_raw, save_raw
from unmix.index.store import TokenStore

TILE = 32
TILES = 200_000
"""Tiles at most: 6.4 M entries of 5 bytes."""
EMBEDDED = 20_000
"""Tiles that a given embedding is asked for at most."""
EMBED_BATCH = 512
TERMS = 64
"""Words of a query at most: those that count most in it."""
K1, B, K3 = 1.2, 0.75, 8.0
"""BM25's usual constants (Robertson and Zaragoza 2009); `K3`: how soon a token's times in the query stop to count."""
SEED = 20_009

Embed = Callable[[list[str]], np.ndarray]
"""Texts → one vector each [texts, d]."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Tiles and their inverted index. Token ids are the terms; masked positions are left out."""

    store: TokenStore
    contexts: Int64[np.ndarray, " contexts"]
    terms: Int64[np.ndarray, " terms"]
    offsets: Int64[np.ndarray, " terms_and_one"]
    tiles: Integer[np.ndarray, " entries"]
    counts: Integer[np.ndarray, " entries"]
    lengths: Integer[np.ndarray, " tiles"]
    cache: Cache | None = None
    _embedded: dict[Embed, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict[Embed, tuple[np.ndarray, np.ndarray]]
    )

    @property
    def per_context(self) -> int:
        """Tiles of a context."""
        return -(-self.store.context // TILE)

    @property
    def n_tiles(self) -> int:
        """All tiles."""
        return len(self.lengths)

    def bounds(self, tiles: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Global `[start, end)` of some tiles."""
        row, part = np.divmod(tiles, self.per_context)
        base = self.contexts[row] * self.store.context
        return base + part * TILE, base + np.minimum((part + 1) * TILE, self.store.context)

    def scores(self, tokens: Int64[np.ndarray, " n"]) -> tuple[Float64[np.ndarray, " tiles"], dict[int, float]]:
        """BM25 of every tile for a bag of tokens, and the weight of each token that was asked for.

        Of the bag's different tokens the 64 that count most are asked: times in the bag, saturating, × inverse document
        frequency.
        """
        asked, times = np.unique(tokens, return_counts=True)
        places = np.searchsorted(self.terms, asked)
        known = (places < len(self.terms)) & (self.terms[np.minimum(places, len(self.terms) - 1)] == asked)
        asked, times, places = asked[known], times[known], places[known]
        found_in = self.offsets[places + 1] - self.offsets[places]
        weights = times * (K3 + 1) / (times + K3) * np.log1p((self.n_tiles - found_in + 0.5) / (found_in + 0.5))
        best = np.argsort(-weights, kind="stable")[:TERMS]
        mean = max(float(self.lengths.mean()), 1.0)
        scores = np.zeros(self.n_tiles)
        for place, weight in zip(places[best].tolist(), weights[best].tolist(), strict=True):
            part = slice(int(self.offsets[place]), int(self.offsets[place + 1]))
            tiles, counts = self.tiles[part], self.counts[part].astype(np.float64)
            length = K1 * (1 - B + B * self.lengths[tiles] / mean)
            scores[tiles] += weight * counts * (K1 + 1) / (counts + length)
        return scores, dict(zip(asked[best].tolist(), weights[best].tolist(), strict=True))

    def cosines(self, embed: Embed, texts: list[str]) -> Float64[np.ndarray, " tiles"]:
        """Cosine of every tile with the mean direction of `texts`; −inf for tiles that were not embedded.

        The tiles (at most 20,000, a uniform sample where there are more) are embedded once for each `embed`.
        """
        if embed not in self._embedded:
            tiles = np.sort(shuffled(SEED, self.n_tiles, 0, EMBEDDED))
            self._embedded[embed] = tiles, self._embed(embed, self.texts(*self.bounds(tiles)))
        tiles, vectors = self._embedded[embed]
        mean = self._embed(embed, texts).mean(axis=0)
        scores = np.full(self.n_tiles, -np.inf)
        scores[tiles] = vectors @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
        return scores

    def texts(self, starts: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " n"]) -> list[str]:
        """The text of some stretches; `ConfigError` where the index holds no vocabulary."""
        strings = self.store.strings(self.store.tokens.reshape(-1)[ranges(starts, ends)])
        if strings is None:
            raise ConfigError(f"{self.store.folder} holds no vocabulary, so there is no text to embed")
        cuts = np.concatenate([[0], np.cumsum(ends - starts)]).tolist()
        return ["".join(strings[first:last]) for first, last in pairwise(cuts)]

    def _embed(self, embed: Embed, texts: list[str]) -> Float32[np.ndarray, "texts d"]:
        parts: list[np.ndarray] = []
        for first in range(0, len(texts), EMBED_BATCH):
            batch = texts[first : first + EMBED_BATCH]
            vectors = np.asarray(embed(batch), np.float32)
            if vectors.ndim != 2 or len(vectors) != len(batch) or not np.isfinite(vectors).all():
                raise ConfigError(
                    f"embed gave {list(vectors.shape)} for {len(batch)} texts, expected [{len(batch)}, d], all finite"
                )
            parts.append(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
        return np.concatenate(parts)


def open_texts(store: TokenStore, key: str) -> Texts:
    """The text index of a token store: from the cache where one has this `key`, or made now and cached.

    Making it takes about 2 s for 6.4 M positions.
    """
    cache = cached(store.folder, "texts", key, lambda folder: _write(folder, store))
    contexts = open_raw(cache.folder / "contexts.bin", np.int64, (cache.size("contexts.bin") // 8,))
    n_terms = cache.size("terms.bin") // 8
    entries = cache.size("counts.bin")
    return Texts(
        store, contexts,
        open_raw(cache.folder / "terms.bin", np.int64, (n_terms,)),
        open_raw(cache.folder / "offsets.bin", np.int64, (n_terms + 1,)),
        open_raw(cache.folder / "tiles.bin", np.uint32, (entries,)),
        open_raw(cache.folder / "counts.bin", np.uint8, (entries,)),
        open_raw(cache.folder / "lengths.bin", np.uint8, (len(contexts) * -(-store.context // TILE),)),
        cache,
    )  # fmt: skip


def _write(folder: Path, store: TokenStore) -> None:
    per_context = -(-store.context // TILE)
    contexts = np.sort(shuffled(SEED, store.n_contexts, 0, max(TILES // per_context, 1)))
    mask = store.mask(contexts)
    row, place = np.nonzero(mask)
    tokens = store.tokens[contexts[row], place].astype(np.uint64)
    tile = (row * per_context + place // TILE).astype(np.uint64)
    keys = tokens << np.uint64(32) | tile
    keys.sort()
    fresh = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    counts = np.diff(np.append(fresh, len(keys)))
    entry_terms = (keys[fresh] >> np.uint64(32)).astype(np.int64)
    begins = np.flatnonzero(np.concatenate([[True], entry_terms[1:] != entry_terms[:-1]])[: len(entry_terms)])
    arrays: dict[str, np.ndarray] = {
        "contexts": contexts,
        "terms": entry_terms[begins],
        "offsets": np.append(begins, len(entry_terms)).astype(np.int64),
        "tiles": (keys[fresh] & np.uint64(2**32 - 1)).astype(np.uint32),
        "counts": counts.astype(np.uint8),
        "lengths": np.bincount(tile.astype(np.int64), minlength=len(contexts) * per_context).astype(np.uint8),
    }
    for name, array in arrays.items():
        save_raw(folder / f"{name}.bin", array)
