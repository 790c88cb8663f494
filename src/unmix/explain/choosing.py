"""Which latents are explained."""

from __future__ import annotations

import numpy as np

from unmix.core.errors import ConfigError
from unmix.core.seeds import derive
from unmix.explain.windows import ROLES_OF
from unmix.index.layout import role_ids
from unmix.index.reader import CoderIndex, LatentIndex

WINDOWS, SCORED, DENSE = 20, 5, 0.10
"""Windows in explaining and firings in scoring contexts that a latent needs; the frequency it must not have."""


def choose_latents(index: LatentIndex, n: int, seed: int = 0, coder: str | None = None) -> list[int]:
    """`n` latents that can be explained and scored, spread over their frequencies; fewer where there are fewer.

    A latent is eligible with at least 20 windows in explaining contexts, at least 5 firings in scoring contexts (where
    there are any), and firings on at most 10 % of the tokens. One is drawn from each of `n` equal parts of the
    eligible ones, ordered by frequency. The same index, n and seed give the same latents; ascending ids.

    Raises `ConfigError` where none is eligible.
    """
    if n < 1:
        raise ConfigError(f"{n} latents were asked for, expected 1 or more")
    found = index.coder(coder)
    eligible = _eligible(index, found)
    rng = np.random.default_rng(derive(seed, "latents", found.name, n))
    chosen: list[int] = []
    for part in np.array_split(eligible, min(n, len(eligible))) if len(eligible) else []:
        for latent in rng.permutation(part):
            if _has_windows(index, found, int(latent)):
                chosen.append(int(latent))
                break
    if len(chosen) < n:
        rest = rng.permutation(np.setdiff1d(eligible, chosen))
        for latent in rest:
            if len(chosen) == n:
                break
            if _has_windows(index, found, int(latent)):
                chosen.append(int(latent))
    if not chosen:
        raise ConfigError(
            f"{found.name!r} has no latent with {WINDOWS} windows to explain, {SCORED} firings to score on and a "
            f"frequency of at most {DENSE:.0%}; index more text, or name latents yourself"
        )
    return sorted(chosen)


def _roles(index: LatentIndex, purpose: str) -> list[str]:
    return [role for role in ROLES_OF["explaining" if purpose == "explaining" else "scoring"] if role in index.roles]


def _eligible(index: LatentIndex, coder: CoderIndex) -> np.ndarray:
    """Ids by rising frequency (ties by id), firings in place of windows: cheap for every latent."""
    firings = coder.figures.firings_by_role
    enough = firings[:, role_ids(index.roles, _roles(index, "explaining")) or []].sum(axis=1) >= WINDOWS
    scoring = _roles(index, "scoring")
    if len(index.contexts_of(scoring)):
        enough &= firings[:, role_ids(index.roles, scoring) or []].sum(axis=1) >= SCORED
    ids = np.flatnonzero(enough & (coder.frequency <= DENSE))
    return ids[np.argsort(coder.frequency[ids], kind="stable")]


def _has_windows(index: LatentIndex, coder: CoderIndex, latent: int) -> bool:
    return len(coder[latent].peaks(_roles(index, "explaining"))) >= WINDOWS
