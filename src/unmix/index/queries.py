"""Questions from the side of the text: which latents fire on a token, in a document, at a position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from unmix.core.errors import ConfigError, did_you_mean, nearest
from unmix.core.seeds import derive
from unmix.index.documents import ranges
from unmix.index.filters import Filter
from unmix.index.forward import Forward, PositionCodes
from unmix.index.store import TokenStore

OCCURRENCES = 100_000
"""Positions of a token that are looked at where nothing else is asked for."""
STEP = 2**22
"""Token ids scanned in one go."""
ROWS = 2**14
"""Positions turned into latents in one go."""
ORDERS = ("sum", "count", "mean", "max", "lift")

Token = int | str | Sequence[int | str]
"""A token id, a token's exact display string (" Paris"), or several of these."""


@dataclass(frozen=True)
class LatentHit:
    """A latent that fires on some positions: a token's, a document's, or one."""

    coder: str
    latent: int
    count: int
    """Firings on these positions."""
    sum: float
    """Summed strength (|activation|)."""
    mean: float
    """Mean activation where it fires there, sign kept."""
    max: float
    """Largest |activation| there."""
    share: float
    """Part of these positions on which it fires."""
    lift: float
    """`share` over the latent's frequency in the whole index: above 1 where it prefers these positions."""


@dataclass(frozen=True)
class Tally:
    """Sums over some positions, one entry a latent."""

    positions: int
    count: Int64[np.ndarray, " latents"]
    sum: Float64[np.ndarray, " latents"]
    signed: Float64[np.ndarray, " latents"]
    max: Float64[np.ndarray, " latents"]

    def hits(self, coder: str, frequency: Float64[np.ndarray, " latents"], by: str, n: int | None) -> list[LatentHit]:
        """The latents that fire, by one of `ORDERS`, largest first; ties by id."""
        ids = np.flatnonzero(self.count)
        count = self.count[ids]
        share = count / max(self.positions, 1)
        columns = {
            "count": count, "sum": self.sum[ids], "mean": self.signed[ids] / count, "max": self.max[ids],
            "share": share, "lift": share / np.maximum(frequency[ids], 1e-300),
        }  # fmt: skip
        order = np.argsort(-np.abs(columns[by]), kind="stable")[:n]
        rows = zip(ids[order].tolist(), *(columns[name][order].tolist() for name in columns), strict=True)
        names = list(columns)
        return [LatentHit(coder, i, **dict(zip(names, values, strict=True))) for i, *values in rows]


def check_order(by: str, n: int | None) -> None:
    """`ConfigError` for an order that does not exist, or for less than no latents."""
    if by not in ORDERS:
        raise ConfigError(f"cannot order latents by {by!r}. {did_you_mean(by, ORDERS)}")
    if n is not None and n < 0:
        raise ConfigError(f"n is {n}, expected 0 or more")


def tally(codes: Iterator[PositionCodes], n_latents: int) -> Tally:
    """Sum codes over all of their rows, in order."""
    count, total, signed, top = np.zeros(n_latents, np.int64), *np.zeros((3, n_latents))
    positions = 0
    for part in codes:
        strength = np.abs(part.values).astype(np.float64)
        positions += len(part)
        count += np.bincount(part.indices, minlength=n_latents)
        total += np.bincount(part.indices, strength, n_latents)
        signed += np.bincount(part.indices, part.values.astype(np.float64), n_latents)
        np.maximum.at(top, part.indices, strength)
    return Tally(positions, count, total, signed, top)


def rows_at(forward: Forward, positions: Int64[np.ndarray, " n"]) -> Iterator[PositionCodes]:
    """The codes of some positions (ascending), a few thousand positions at a time."""
    for first in range(0, len(positions), ROWS):
        yield forward.at(positions[first : first + ROWS])


def token_ids(store: TokenStore, token: Token) -> list[int]:
    """Ids of a token given by id or by its exact display string; several strings or ids together.

    `ConfigError` for a string that is no single token, naming those that differ only in spaces or case, or are near.
    """
    if isinstance(token, str):
        return _spelt(store, token)
    if isinstance(token, int | np.integer):
        if token < 0:
            raise ConfigError(f"token id {token} is out of range: it must be 0 or more")
        if store.vocab is not None and token >= len(store.vocab):
            raise ConfigError(f"token id {token} is out of range: the vocabulary has ids 0 to {len(store.vocab) - 1}")
        return [int(token)]
    return sorted({i for one in token for i in token_ids(store, one)})


def _spelt(store: TokenStore, token: str) -> list[int]:
    if store.vocab is None:
        raise ConfigError(f"{store.folder} holds no vocabulary: name tokens by id")
    found = [i for i, string in enumerate(store.vocab) if string == token]
    if not found:
        bare = token.strip().lower()
        alike = sorted({s for s in store.vocab if s.strip().lower() == bare}) if bare else []
        alike = alike[:5] or nearest(token, [s for s in store.vocab if s.strip().lower()[:2] == bare[:2]])
        hint = f" Did you mean {' or '.join(map(repr, alike))}?" if alike else " Give the ids of its tokens."
        raise ConfigError(f"{token!r} is not one token of this index.{hint}")
    return found


def positions_of(
    store: TokenStore, ids: Sequence[int], keep: Filter, at_most: int | None, seed: int = 0
) -> Int64[np.ndarray, " n"]:
    """Unmasked positions at which one of the tokens stands, ascending; a seeded uniform sample of `at_most` of them."""
    found: list[np.ndarray] = []
    tokens = store.tokens.reshape(-1)
    step = max(STEP // store.context, 1)
    lookup = len(ids) > 1
    for first in range(0, store.n_contexts, step):
        base = first * store.context
        part = tokens[base : base + step * store.context]
        places = np.flatnonzero(np.isin(part, ids) if lookup else part == (ids[0] if ids else -1))
        contexts, place = np.divmod(places + base, store.context)
        if len(contexts):
            rows, row = np.unique(contexts, return_inverse=True)
            places = places[store.mask(rows)[row, place]]
        found.append(places + base)
    positions = np.concatenate(found)
    positions = positions[keep.keeps(positions)]
    if at_most is None or len(positions) <= at_most:
        return positions
    rng = np.random.default_rng(derive(seed, "occurrences", *ids))
    return positions[np.sort(rng.choice(len(positions), at_most, replace=False))]


def positions_in(
    store: TokenStore, starts: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " m"]:
    """Unmasked positions of some stretches, ascending."""
    positions = ranges(starts, ends)
    contexts, place = np.divmod(positions, store.context)
    if not len(positions):
        return positions
    rows, row = np.unique(contexts, return_inverse=True)
    return positions[store.mask(rows)[row, place]]
