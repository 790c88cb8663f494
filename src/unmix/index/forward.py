"""The forward side of a coder: for each position the latents that fire there. Derived from the postings, cached.

The index itself is latent-major. What asks the other way round (all latents on a token, in a document, at a position)
reads this: CSR over contexts, entries by position and then by latent. It is made on first use in one streaming pass
over the postings and kept in the cache beside the index: 7 to 11 bytes a firing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from unmix.core.errors import ConfigError
from unmix.core.progress import task
from unmix.index.cache import Cache, cached
from unmix.index.documents import ranges
from unmix.index.layout import CoderEntry, open_raw, write_raw
from unmix.index.part import Part
from unmix.index.shared import SharedStore
from unmix.index.statistics import chunks
from unmix.index.store import PostingStore

BUCKET = 2**22
"""Firings sorted in memory at once, about: 0.2 GB."""
PIECE = 2**21
"""Firings read at once, about."""
RECORD = np.dtype([("position", "<u4"), ("latent", "<u4"), ("value", "<f4")])


@dataclass(frozen=True)
class PositionCodes:
    """Latents and values of some positions, as `unmix.coder.codes.Codes`: CSR, latents ascending in a row."""

    indices: Int32[np.ndarray, " n"]
    values: Float32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " rows_and_one"]
    n_latents: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Latents and values of one position."""
        part = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.indices[part], self.values[part]


@dataclass(frozen=True)
class Forward:
    """The open forward side of one coder; memory maps."""

    context: int
    n_contexts: int
    n_latents: int
    offsets: Int64[np.ndarray, " contexts_and_one"]
    places: Integer[np.ndarray, " firings"]
    latents: Integer[np.ndarray, " firings"]
    values: Float32[np.ndarray, " firings"]
    cache: Cache

    def codes_of(self, contexts: Int64[np.ndarray, " contexts"]) -> PositionCodes:
        """Rows: the positions of the contexts, one context after another, in the order given."""
        entries, place, row = self._entries(contexts)
        counts = np.bincount(row * self.context + place, minlength=len(contexts) * self.context)
        return self._codes(entries, counts)

    def at(self, positions: Int64[np.ndarray, " positions"]) -> PositionCodes:
        """Rows: some global positions, ascending and each once."""
        if len(positions) and ((np.diff(positions) <= 0).any() or positions[0] < 0):
            raise ConfigError("positions must ascend from 0 or more, each once")
        if len(positions) and int(positions[-1]) >= self.n_contexts * self.context:
            last = self.n_contexts * self.context - 1
            raise ConfigError(f"position {int(positions[-1])} is out of range: the last one is {last}")
        contexts, places = np.divmod(positions, self.context)
        first, last = self._begin(contexts, places), self._begin(contexts, places + 1)
        return self._codes(ranges(first, last), last - first)

    def _begin(self, contexts: Int64[np.ndarray, " n"], places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The first entry of each context at its place or later: looked for by halves, for a context is long."""
        low, high = self.offsets[contexts], self.offsets[contexts + 1]
        left = np.flatnonzero(low < high)
        while len(left):
            middle = (low[left] + high[left]) // 2
            before = self.places[middle] < places[left]
            low[left[before]], high[left[~before]] = middle[before] + 1, middle[~before]
            left = left[low[left] < high[left]]
        return low

    def _entries(
        self, contexts: Int64[np.ndarray, " contexts"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Of some contexts: which entries, at which place of the context, in which row of `contexts`."""
        wrong = (contexts < 0) | (contexts >= self.n_contexts)
        if wrong.any():
            raise ConfigError(f"no context {int(contexts[np.argmax(wrong)])}: there are 0 to {self.n_contexts - 1}")
        first, last = self.offsets[contexts], self.offsets[contexts + 1]
        entries = ranges(first, last)
        return entries, self.places[entries].astype(np.int64), np.repeat(np.arange(len(contexts)), last - first)

    def _codes(self, entries: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " rows"]) -> PositionCodes:
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return PositionCodes(self.latents[entries].astype(np.int32), self.values[entries], offsets, self.n_latents)


def open_forward(store: SharedStore, postings: PostingStore, entry: CoderEntry, bucket: int = BUCKET) -> Forward:
    """The forward side of a coder: from the cache, or made now and cached. About a minute for 100 M firings.

    It needs 12 bytes a firing of disk space while it is made; memory stays near 0.3 GB.
    """
    context, n_contexts, n_latents = store.context, store.n_contexts, postings.n_latents

    def make(folder: Path) -> None:
        _write(folder, postings, context, n_contexts, bucket)

    cache = cached(store.folder, f"{entry.folder}.forward", store.keys.coder(entry.folder), make)
    total = cache.size("values.bin") // 4
    return Forward(
        context, n_contexts, n_latents,
        open_raw(cache.folder / "offsets.bin", np.int64, (n_contexts + 1,)),
        open_raw(cache.folder / "places.bin", _small(context), (total,)),
        open_raw(cache.folder / "latents.bin", _small(n_latents), (total,)),
        open_raw(cache.folder / "values.bin", np.float32, (total,)),
        cache,
    )  # fmt: skip


def _small(limit: int) -> str:
    """The smallest unsigned integer that holds 0 to `limit - 1`."""
    return np.min_scalar_type(limit - 1).name


def _write(folder: Path, postings: PostingStore, context: int, n_contexts: int, bucket: int) -> None:
    counts = postings.counts
    # A bucket is a run of contexts, short enough for its positions to be counted in 32 bits.
    n_buckets = max(1, -(-int(counts.sum()) // bucket), -(-n_contexts * context // 2**32))
    width = -(-n_contexts // n_buckets)
    names = [folder / f"bucket-{i}.tmp" for i in range(-(-n_contexts // width))]
    with task("turning the postings round", int(counts.sum())) as progress:
        for name in names:
            name.touch()
        for first, last in chunks(counts, PIECE):
            for part in _parts(postings, first, last, n_contexts):
                _split(part, first, width * context, names)
            progress.advance(int(counts[first:last].sum()))
        per_context = np.zeros(n_contexts, np.int64)
        with ExitStack() as stack:
            out = {
                name: stack.enter_context((folder / f"{name}.bin").open("wb"))
                for name in ("places", "latents", "values")
            }
            for i, name in enumerate(names):
                records = np.fromfile(name, RECORD)
                name.unlink()
                records = records[np.argsort(records["position"], kind="stable")]  # they came by latent
                row, place = np.divmod(records["position"], np.uint32(context))
                span = per_context[i * width : (i + 1) * width]
                span += np.bincount(row, minlength=len(span))
                write_raw(out["places"], place.astype(_small(context)))
                write_raw(out["latents"], records["latent"].astype(_small(postings.n_latents)))
                write_raw(out["values"], records["value"])
    with (folder / "offsets.bin").open("wb") as file:
        write_raw(file, np.concatenate([[0], np.cumsum(per_context)]).astype(np.int64))


def _parts(postings: PostingStore, first: int, last: int, n_contexts: int) -> Iterator[Part]:
    """The postings of a run of latents; of a single dense one, a stretch of contexts at a time."""
    count = int(postings.counts[first])
    if last - first > 1 or count <= PIECE:
        yield postings.part(first, last)
        return
    edges = np.linspace(0, n_contexts, min(-(-count // PIECE), n_contexts) + 1).astype(np.int64)
    for begin, end in pairwise(edges.tolist()):
        positions, values = postings.within(first, np.arange(begin, end))
        yield Part(np.array([len(positions)]), positions, values)


def _split(part: Part, first: int, span: int, files: Sequence[Path]) -> None:
    """Append the firings of latents from `first` on to the files of their buckets, each by latent, then by position.

    A file is open only while it is written: a large index has more buckets than a process may hold files open.
    """
    records = np.empty(len(part.positions), RECORD)
    bucket, records["position"] = np.divmod(part.positions, span)
    records["latent"] = np.repeat(np.arange(first, first + len(part.counts), dtype=np.uint32), part.counts)
    records["value"] = part.values
    if len(files) > 1:
        records = records[np.argsort(bucket.astype(np.uint16), kind="stable")]
    cuts = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=len(files)))])
    for i, path in enumerate(files):
        if cuts[i + 1] > cuts[i]:
            with path.open("ab") as file:
                write_raw(file, records[cuts[i] : cuts[i + 1]])
