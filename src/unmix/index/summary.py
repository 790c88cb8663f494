"""The plain summary behind `unmix index stats`."""

from __future__ import annotations

from typing import Any

import numpy as np

from unmix.index.reader import CoderIndex, LatentIndex

DENSE = (0.01, 0.1)
"""Frequencies above which a latent counts as dense (maths: `dense_fraction`)."""


def summarise(index: LatentIndex) -> dict[str, Any]:
    """Plain numbers, fit for JSON: sizes, tokens by role, and for each coder its latents' figures."""
    description = index.description
    contexts = np.bincount(index.store.role_of, minlength=len(index.roles))
    return {
        "folder": str(index.folder),
        "hash": index.hash,
        "context": index.context,
        "n_contexts": index.n_contexts,
        "n_tokens": index.n_tokens,
        "n_counted": sum(description.counted),
        "roles": {
            role: {"contexts": int(contexts[i]), "counted": description.counted[i]}
            for i, role in enumerate(index.roles)
        },
        "segments": len(description.segments),
        "bytes": sum(f.stat().st_size for f in index.folder.rglob("*") if f.is_file()),
        "coders": {name: _coder(coder, sum(description.counted)) for name, coder in index.coders.items()},
        "meta": index.meta,
    }


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
        "dense_fraction": {f"{limit:g}": float((figures.frequency > limit).sum() / n) for limit in DENSE},
        "frequency_median": float(np.median(frequencies)) if len(frequencies) else 0.0,
        "max": float(figures.max.max()),
        "most_frequent": int(figures.ranking("frequency")[0]),
    }
