"""One coder's `statistics/` from its finished postings and the index's token files, and from nothing else.

Latents are taken in runs of about a million postings, and a latent that fires more often in pieces, so that memory
stays bounded whatever the corpus. No cut into shards, segments or runs, and no number of workers, can change a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32, Int64

from unmix.core.atomic import disk_errors
from unmix.index.co_firing import Sample
from unmix.index.layout import IndexMeta, write_raw
from unmix.index.statistics import PLACE_BINS, chunks, fields, figure_paths
from unmix.index.store import PostingStore, TokenStore
from unmix.index.tally import BLOCK, DENSE, Block, Tally, central_moments
from unmix.index.totals import count_totals

BYTES_PER_POSTING = 64
"""Held in memory for each posting that is read at once."""
READ_POSTINGS = 2**20

Piece = tuple[Int64[np.ndarray, " latents"], Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]
"""Counts, positions, values."""


def derive(folder: Path, meta: IndexMeta, name: str, budget_bytes: int) -> None:
    """Write `statistics/` of the coder `name` of the index in `folder`, whose segments and token files are whole.

    Memory stays near `budget_bytes` (but a hundred megabytes are always needed); the result does not depend on it.
    An older `statistics/` is overwritten.
    """
    store, postings = TokenStore(folder, meta), PostingStore(folder, meta, meta.coders[name])
    at_once = max(min(budget_bytes // BYTES_PER_POSTING, READ_POSTINGS), 1)
    kinds = fields(postings.n_latents, meta)
    reader = _Reader(store, postings)
    with disk_errors(postings.folder), ExitStack() as stack:
        (postings.folder / "statistics").mkdir(exist_ok=True)
        paths = figure_paths(postings.folder, meta)
        files = {field: stack.enter_context(path.open("wb")) for field, path in paths.items()}
        _write(files, kinds, reader.totals.tables())
        sample = Sample(postings.counts, meta.n_tokens)
        for first, last in runs(postings.counts, at_once):
            for rows in _rows(reader, sample, first, last):
                _write(files, kinds, rows)
        for ids, jaccard in sample.neighbours():
            _write(files, kinds, {"co_firing_ids": ids, "co_firing_jaccard": jaccard})


def _write(
    files: Mapping[str, BinaryIO], kinds: dict[str, tuple[str, tuple[int, ...]]], rows: dict[str, np.ndarray]
) -> None:
    for field, array in rows.items():
        write_raw(files[field], array.astype(kinds[field][0], copy=False))


def runs(counts: Int64[np.ndarray, " latents"], postings: int) -> list[tuple[int, int]]:
    """Runs of latents `[first, last)` of at most `postings` postings; a dense latent is a run by itself."""
    edges = np.flatnonzero(counts > DENSE)
    edges = np.unique(np.concatenate([[0], edges, edges + 1, [len(counts)]]))
    return [
        (begin + first, begin + last)
        for begin, end in pairwise(edges.tolist())
        for first, last in chunks(counts[begin:end], postings)
    ]


def _rows(reader: _Reader, sample: Sample, first: int, last: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a run, latents ascending, a few of them at a time."""
    counts = reader.postings.counts[first:last]
    if counts[0] > DENSE:
        yield _dense(reader, sample, first)
        return
    part = reader.postings.part(first, last)
    sample.add(first, part.counts, part.positions)
    ends = np.cumsum(counts)
    for begin, end in chunks(counts):
        here = slice(int(ends[begin] - counts[begin]), int(ends[end - 1]))
        piece = (counts[begin:end], part.positions[here], part.values[here])
        tally = Tally(end - begin, reader.totals, reader.vocab, False)
        tally.add(reader.block(piece))
        yield _finished(tally, [piece])


def _dense(reader: _Reader, sample: Sample, latent: int) -> dict[str, np.ndarray]:
    """The row of one latent; where it fits, it is read once, else once more for its moments."""
    held = [*reader.pieces(latent)] if reader.postings.counts[latent] <= READ_POSTINGS else None
    tally = Tally(1, reader.totals, reader.vocab, True)
    for piece in held or reader.pieces(latent):
        tally.add(reader.block(piece))
        sample.add_piece(latent, piece[1])
    return _finished(tally, held or reader.pieces(latent))


def _finished(tally: Tally, pieces: Iterable[Piece]) -> dict[str, np.ndarray]:
    mean = tally.sum / np.maximum(tally.counts, 1)
    return tally.rows(central_moments(((counts, values) for counts, _, values in pieces), mean))


class _Reader:
    """Postings of runs of latents, and what stands at their positions."""

    def __init__(self, store: TokenStore, postings: PostingStore) -> None:
        self.store, self.postings = store, postings
        self._tokens, self._documents = store.tokens.reshape(-1), store.documents.reshape(-1)
        self._slices = {f"slice-{name}": numbers.reshape(-1) for name, numbers in store.slices.items()}
        bins = min(PLACE_BINS, store.context)
        self._place_bins = (np.arange(store.context) * bins // store.context).astype(np.uint8)
        self.totals = count_totals(store, self._place_bins)
        self.vocab = 2**16 if store.tokens.dtype == np.uint16 else int(store.tokens.max()) + 1
        self._small = store.meta.n_tokens < 2**32

    def pieces(self, latent: int) -> Iterator[Piece]:
        """The postings of one latent, `BLOCK` by `BLOCK`; no more than some `READ_POSTINGS` are held."""
        steps = -(-int(self.postings.counts[latent]) // READ_POSTINGS)
        edges = [step * self.store.n_contexts // steps for step in range(steps + 1)]
        positions, values = np.empty(0, np.int64), np.empty(0, np.float32)
        for begin, end in pairwise(edges):
            more = self.postings.read(latent) if steps == 1 else self.postings.within(latent, np.arange(begin, end))
            positions, values = np.append(positions, more[0]), np.append(values, more[1])
            whole = len(positions) // BLOCK * BLOCK
            for at in range(0, whole, BLOCK):
                yield np.array([BLOCK]), positions[at : at + BLOCK], values[at : at + BLOCK]
            positions, values = positions[whole:], values[whole:]
        if len(positions):
            yield np.array([len(positions)]), positions, values

    def block(self, piece: Piece) -> Block:
        """A piece with what stands at its positions."""
        counts, positions, values = piece
        if self._small:
            narrow = positions.astype(np.uint32)
            contexts = narrow // np.uint32(self.store.context)
            places = narrow - contexts * np.uint32(self.store.context)
        else:
            contexts, places = np.divmod(positions, self.store.context)
        parts = {"roles": self.store.role_of[contexts]}
        parts |= {name: numbers[positions] for name, numbers in self._slices.items()}
        return Block(
            counts, values, self._tokens[positions], self._place_bins[places], self._documents[positions], parts
        )
