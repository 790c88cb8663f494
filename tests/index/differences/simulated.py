"""Documents in which latents fire in clusters, and the counts that an index would keep of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from index.oracle import ArrayCodes
from unmix.index.differences.evidence import Counts
from unmix.index.reader import LatentIndex, open_index
from unmix.index.writer import IndexWriter


def documents(
    rng: np.random.Generator,
    n: int,
    presence: np.ndarray,
    intensity: np.ndarray,
    length: float = 200.0,
    uneven: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """`(tokens [n], firings [n, latents])`: most documents lack the latent's topic, the others fire in clusters.

    Each token of a document with the topic fires at a rate drawn for that document around `intensity`; neither
    topic nor rate knows of the length, so the rate a token is the same in long documents and the share is not.
    """
    tokens = np.maximum(rng.lognormal(np.log(length) - 0.18, 0.6, n).astype(np.int64), 5)
    topic = rng.random((n, len(presence))) < presence
    rates = np.minimum(intensity * rng.lognormal(-(uneven**2) / 2, uneven, (n, len(presence))), 0.9)
    return tokens, np.where(topic, rng.binomial(tokens[:, None], rates), 0)


def counts(tokens: np.ndarray, firings: np.ndarray) -> Counts:
    """What an index keeps of them."""
    return Counts(
        int(tokens.sum()), len(tokens), int((tokens**2).sum()), firings.sum(axis=0), (firings > 0).sum(axis=0),
        1.5 * firings.sum(axis=0), (firings**2).sum(axis=0), (firings * tokens[:, None]).sum(axis=0),
    )  # fmt: skip


def latents(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Presence and intensity of `n` latents, from rare and strong to nearly everywhere."""
    return np.exp(rng.uniform(np.log(0.003), np.log(0.9), n)), np.exp(rng.uniform(np.log(0.01), np.log(0.2), n))


def write_index(folder: Path, seed: int, firings: np.ndarray, labels: np.ndarray, **meta: object) -> LatentIndex:
    """An index of documents of 24 tokens in contexts of 48, a latent firing `firings [n, latents]` times in each.

    Slicings: `label` (by document: wikipedia, books, empty) and `speaker` (user: the first third of a document).
    """
    n, n_latents = firings.shape
    rng = np.random.default_rng(seed)
    dense = np.zeros((n, 24, n_latents), np.float32)
    for document, latent in zip(*np.nonzero(firings), strict=True):
        places = rng.choice(24, firings[document, latent], replace=False)
        dense[document, places, latent] = rng.uniform(0.5, 2.0, len(places))
    contexts = n // 2
    tokens = np.random.default_rng(0).integers(0, 50, (contexts, 48))
    documents = np.repeat(np.arange(n), 24).reshape(contexts, 48)
    slices = {"label": labels[documents], "speaker": np.tile((np.arange(24) >= 8).astype(np.int64), (contexts, 2))}
    roles = (np.arange(contexts) % 2 + 2).astype(np.uint8)
    names = {"label": ("wikipedia", "books", "empty"), "speaker": ("user", "assistant")}
    writer = IndexWriter(
        folder, {"a": n_latents}, 48, meta, vocab=[f" w{i}" for i in range(50)], slices=names
    )  # fmt: skip
    with writer:
        codes = ArrayCodes.from_dense(dense.reshape(-1, n_latents))
        writer.add(tokens, roles, documents, np.ones((contexts, 48), bool), {"a": codes}, slices)
    return open_index(folder)
