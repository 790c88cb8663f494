"""The plain summary behind `unmix index stats`."""

from __future__ import annotations

from typing import Any

import numpy as np

from unmix.index.figures import Figures, SliceFigures
from unmix.index.reader import CoderIndex, LatentIndex

DENSE = (0.01, 0.1)
"""Frequencies above which a latent counts as dense (maths: `dense_fraction`)."""


def summarise(index: LatentIndex) -> dict[str, Any]:
    """Plain numbers, fit for JSON: sizes, tokens by role and slice, and for each coder its latents' figures."""
    description = index.description
    contexts = np.bincount(index.store.role_of, minlength=len(index.roles))
    coders = {name: coder.figures for name, coder in index.coders.items()}
    one = next(iter(coders.values()))
    return {
        "folder": str(index.folder),
        "hash": index.hash,
        "context": index.context,
        "n_contexts": index.n_contexts,
        "n_tokens": index.n_tokens,
        "n_counted": sum(description.counted),
        "n_documents": one.n_documents,
        "roles": {
            role: {"contexts": int(contexts[i]), "counted": description.counted[i]}
            for i, role in enumerate(index.roles)
        },
        "role_documents": dict(zip(index.roles, one.in_roles.n_documents.tolist(), strict=True)),
        "slices": {name: _values(one.in_slice(name)) for name in description.slices},
        "segments": len(description.segments),
        "bytes": sum(f.stat().st_size for f in index.folder.rglob("*") if f.is_file()),
        "coders": {name: _coder(coder, sum(description.counted)) for name, coder in index.coders.items()},
        "meta": index.meta,
    }


def _values(found: SliceFigures) -> dict[str, dict[str, int]]:
    columns = zip(found.values, found.tokens.tolist(), found.n_documents.tolist(), strict=True)
    return {value: {"counted": tokens, "documents": documents} for value, tokens, documents in columns}


def _coder(coder: CoderIndex, counted: int) -> dict[str, Any]:
    figures, alive = coder.figures, coder.alive
    firings = int(figures.firings.sum())
    frequencies = figures.frequency[alive]
    n = coder.n_latents
    return {
        "n_latents": n,
        "firings": firings,
        "l0": firings / max(counted, 1),
        "alive": int(alive.sum()),
        "alive_fraction": float(alive.mean()),
        "dead": n - int(alive.sum()),
        "dense": {f"{limit:g}": int((figures.frequency > limit).sum()) for limit in DENSE},
        "dense_fraction": {f"{limit:g}": float((figures.frequency > limit).sum() / n) for limit in DENSE},
        "frequency_median": float(np.median(frequencies)) if len(frequencies) else 0.0,
        "single_token": {
            "weak": int(figures.single_token_weak.sum()),
            "strong": int(figures.single_token_strong.sum()),
        },
        "max": float(figures.max.max()),
        "most_frequent": int(figures.ranking("frequency")[0]),
        "l0_in": _l0(figures),
    }


def _l0(figures: Figures) -> dict[str, dict[str, float]]:
    """Mean number of latents that fire, by role and by the values of every slicing; 0 where there is no position."""
    partitions = {"role": figures.in_roles} | {name: figures.in_slice(name) for name in figures.slicings}
    return {
        name: {
            value: float(fired / max(tokens, 1))
            for value, fired, tokens in zip(part.values, part.firings.sum(axis=0), part.tokens, strict=True)
        }
        for name, part in partitions.items()
    }
