"""A random token stream, held dense, and what an index of it must say, computed the slow way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from unmix.data.config import ROLES
from unmix.index.reader import LatentIndex, open_index
from unmix.index.writer import IndexWriter


@dataclass(frozen=True)
class ArrayCodes:
    """CSR codes as NumPy arrays."""

    indices: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    n_latents: int

    @classmethod
    def from_dense(cls, dense: np.ndarray, keep_zeros: np.ndarray | None = None) -> ArrayCodes:
        """Entries of `dense [rows, F]` that are non-zero, and explicit zeros where `keep_zeros` says so."""
        stored = dense != 0 if keep_zeros is None else (dense != 0) | keep_zeros
        rows, ids = np.nonzero(stored)
        offsets = np.concatenate([[0], np.cumsum(stored.sum(axis=1))]).astype(np.int64)
        return cls(ids.astype(np.int32), dense[rows, ids].astype(np.float32), offsets, dense.shape[1])


@dataclass(frozen=True)
class Stream:
    """`codes[name]` is [n_contexts, context, F] float32, masked positions included."""

    tokens: np.ndarray
    roles: np.ndarray
    documents: np.ndarray
    mask: np.ndarray
    codes: dict[str, np.ndarray]

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    def counted(self, name: str) -> np.ndarray:
        """The codes with masked positions set to 0."""
        return np.where(self.mask[..., None], self.codes[name], 0)


def make_stream(
    seed: int, n_contexts: int = 24, context: int = 12, n_latents: int = 5, vocab: int = 7, density: float = 0.3,
    names: tuple[str, ...] = ("a",),
) -> Stream:  # fmt: skip
    """Latents of very different scale and density; the last one is dead where there are several; some are signed."""
    rng = np.random.default_rng(seed)
    shape = (n_contexts, context)
    codes: dict[str, np.ndarray] = {}
    for name in names:
        scales = 10.0 ** rng.uniform(-6, 6, n_latents)
        share = np.minimum(rng.uniform(0, 2 * density, n_latents), 1)
        if n_latents > 1:
            share[-1] = 0
        fires = rng.random((*shape, n_latents)) < share
        values = rng.lognormal(0, 1, (*shape, n_latents)) * scales
        # A few equal values, so that ties are met.
        values = np.where(rng.random(values.shape) < 0.3, scales, values)
        values *= np.where(rng.random(n_latents) < 0.3, rng.choice([-1.0, 1.0], values.shape), 1.0)
        codes[name] = np.where(fires, values, 0).astype(np.float32)
    return Stream(
        rng.integers(0, vocab, shape), rng.integers(0, len(ROLES), n_contexts).astype(np.uint8),
        np.sort(rng.integers(0, 9, shape), axis=None).reshape(shape), rng.random(shape) < 0.85, codes,
    )  # fmt: skip


streams = st.builds(
    make_stream,
    seed=st.integers(0, 2**32 - 1),
    n_contexts=st.integers(1, 20),
    context=st.integers(1, 19),
    n_latents=st.integers(1, 5),
    vocab=st.integers(1, 30),
    density=st.sampled_from([0.02, 0.2, 1.0]),
)


def write(folder: Path, stream: Stream, batch: int = 5, **options: object) -> LatentIndex:
    """Index a stream in batches of `batch` contexts."""
    latents = {name: dense.shape[-1] for name, dense in stream.codes.items()}
    with IndexWriter(folder, latents, stream.context, **options) as writer:  # pyright: ignore[reportArgumentType]
        feed(writer, stream, batch)
    return open_index(folder)


def feed(writer: IndexWriter, stream: Stream, batch: int = 5, start: int = 0, stop: int | None = None) -> None:
    """Give contexts `start` to `stop` to a writer."""
    stop = len(stream.tokens) if stop is None else stop
    for i in range(start, stop, batch):
        part = slice(i, min(i + batch, stop))
        codes = {
            name: ArrayCodes.from_dense(dense[part].reshape(-1, dense.shape[-1]))
            for name, dense in stream.codes.items()
        }
        writer.add(stream.tokens[part], stream.roles[part], stream.documents[part], stream.mask[part], codes)


def bounds(position: int, context: int, left: int, right: int, centred: bool) -> tuple[int, int]:
    """Global window around a position."""
    first = position // context * context
    place = position - first
    if centred:
        return first + max(place - left, 0), first + min(place + right + 1, context)
    width = left + 1 + right
    tile = place // width * width
    return first + tile, first + min(tile + width, context)


def peaks(dense: np.ndarray, context: int, left: int, right: int, centred: bool) -> list[tuple[int, int, int]]:
    """`(position, start, end)` of every firing that no firing of its window beats; strongest first, then earliest."""
    found: list[tuple[int, int, int]] = []
    strength = np.abs(dense)
    for position in np.flatnonzero(dense):
        start, end = bounds(int(position), context, left, right, centred)
        if int(np.argmax(strength[start:end])) + start == position:
            found.append((int(position), start, end))
    return sorted(found, key=lambda peak: (-strength[peak[0]], peak[0]))


def greedy(found: list[tuple[int, int, int]], tokens: np.ndarray, n: int) -> list[tuple[int, int, int]]:
    """The first n that share no position and are not the same text."""
    taken: list[tuple[int, int, int]] = []
    for position, start, end in found:
        overlaps = any(start < e and s < end for _, s, e in taken)
        same = any(list(tokens[start:end]) == list(tokens[s:e]) for _, s, e in taken)
        if not overlaps and not same and len(taken) < n:
            taken.append((position, start, end))
    return taken


def rebuilt(index: LatentIndex, name: str, latent: int, role: object = None) -> np.ndarray:
    """The latent's stored values as a dense array over all positions."""
    positions, values = index[name][latent].postings(role)
    dense = np.zeros(index.n_tokens, np.float32)
    dense[positions.astype(np.int64)] = values
    return dense
