"""How large a latent index is and how fast it is built and read, at growing numbers of postings.

    python -m benchmarks.index                              # 1M and 10M postings
    python -m benchmarks.index --postings 100M              # minutes; memory stays bounded
    python -m benchmarks.index --latents 131072 --k 64 --budget-mib 256

The stream is made up batch by batch: k distinct latents a token with Zipfian frequencies (the densest on 60 % of the
tokens), log-normal values, Zipfian token ids. Making it up is not counted. Each size runs in a process of its own, so
that peak memory (after building, the memory maps' pages included) is its own. Reads are timed on warm maps, the median
of five of each latent. Times are the processor's: one thread does everything, and other work on the machine is hardly
felt.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from benchmarks._timing import machine, table
from unmix.index.batch import IndexBatch
from unmix.index.latent import Latent
from unmix.index.reader import CoderIndex, open_index
from unmix.index.writer import IndexWriter

VOCAB = 49152
DENSEST = 5
PARTS = {"values.bin": "values", "positions.bin": "positions", "blocks.bin": "blocks"}
READS: dict[str, Callable[[Latent], object]] = {
    ".postings()": lambda latent: latent.postings(),
    ".top(20)": lambda latent: latent.top(20),
    '.windows("top", 100)': lambda latent: latent.windows("top", 100),
    '.windows("quantiles", 100)': lambda latent: latent.windows("quantiles", 100),
    '.negatives("random", 40)': lambda latent: latent.negatives("random", 40),
}


@dataclass(frozen=True)
class ArrayCodes:
    """Codes as NumPy arrays; the writer reads tensors and arrays alike."""

    indices: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    n_latents: int


@dataclass(frozen=True)
class Size:
    """What one size gave. Bytes are of a posting, latencies milliseconds: median, 95th percentile, worst."""

    postings: int
    seconds: float
    closing: float
    peak_mib: float
    segments: int
    bytes: dict[str, float]
    random: dict[str, np.ndarray]
    dense: dict[str, np.ndarray]


def zipf_shares(n: int, total: float, cap: float) -> np.ndarray:
    """`n` Zipfian shares that sum to `total`, none above `cap`."""
    shares = 1.0 / np.arange(1, n + 1)
    for _ in range(200):
        shares = np.minimum(shares * total / shares.sum(), cap)
    return shares


def stream(options: argparse.Namespace, n_contexts: int) -> Iterator[IndexBatch]:
    """Batches with exactly k distinct latents a token (systematic sampling with Zipfian inclusion probabilities)."""
    rng = np.random.default_rng(options.seed)
    F, k, ctx = options.latents, options.k, options.context
    cumulative = np.cumsum(zipf_shares(F, k, 0.6))
    cumulative *= k / cumulative[-1]
    names = rng.permutation(F).astype(np.int32)
    words = np.cumsum(zipf_shares(VOCAB, 1.0, 1.0))
    for first in range(0, n_contexts, options.batch):
        size = min(options.batch, n_contexts - first)
        rows = size * ctx
        draws = np.arange(k) + rng.random((rows, 1))
        ids = names[np.minimum(np.searchsorted(cumulative, draws), F - 1)]
        ids.sort(axis=1)
        values = np.exp(0.6 * rng.standard_normal(rows * k, np.float32))
        codes = ArrayCodes(ids.reshape(-1), values, np.arange(rows + 1, dtype=np.int64) * k, F)
        tokens = np.minimum(np.searchsorted(words, rng.random((size, ctx))), VOCAB - 1)
        mask = np.ones((size, ctx), bool)
        mask[:, 0] = False
        roles = rng.choice(4, size, p=(0.6, 0.1, 0.15, 0.15)).astype(np.uint8)
        documents = np.broadcast_to(np.arange(first, first + size, dtype=np.int32)[:, None], (size, ctx))
        yield IndexBatch(tokens, roles, documents, mask, {"demo": codes})


def build(folder: Path, options: argparse.Namespace, postings: int) -> tuple[float, float]:
    """Seconds spent taking batches and seconds closing."""
    n_contexts = max(postings // (options.k * (options.context - 1)), 1)
    vocab = [f"w{i}" for i in range(VOCAB)]
    adding = 0.0
    writer = IndexWriter(
        folder, {"demo": options.latents}, options.context, vocab=vocab, budget_bytes=options.budget_mib * 2**20
    )
    with writer:
        for batch in stream(options, n_contexts):
            begin = time.process_time()
            writer.add(batch.tokens, batch.roles, batch.documents, batch.mask, batch.codes)
            adding += time.process_time() - begin
        begin = time.process_time()
        writer.close()
        return adding, time.process_time() - begin


def bytes_of(folder: Path, postings: int) -> dict[str, float]:
    """Bytes a posting of each part of the index, and of all."""
    sizes: dict[str, float] = defaultdict(float)
    for file in folder.rglob("*"):
        if file.is_file():
            size = file.stat().st_size / postings
            inside = file.parent.name.startswith("segment-") and file.name in PARTS
            part = (
                PARTS[file.name]
                if inside
                else "statistics"
                if file.parent.name == "statistics"
                else "tokens and all else"
            )
            sizes[part] += size
            sizes["all"] += size
    return dict(sizes)


def latencies(coder: CoderIndex, latents: np.ndarray, read: Callable[[Latent], object]) -> np.ndarray:
    """Median, 95th percentile and worst of milliseconds over latents; of each latent the median of five reads."""
    return np.percentile([_milliseconds(coder[latent], read) for latent in latents.tolist()], (50, 95, 100))


def _milliseconds(latent: Latent, read: Callable[[Latent], object]) -> float:
    read(latent)
    times: list[float] = []
    for _ in range(5):
        begin = time.thread_time()
        read(latent)
        times.append(1e3 * (time.thread_time() - begin))
    return statistics.median(times)


def measure(options: argparse.Namespace, postings: int) -> Size:
    """Build, weigh and read one size."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as parent:
        folder = Path(parent) / "index"
        adding, closing = build(folder, options, postings)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        index = open_index(folder)
        coder = cast("CoderIndex", index["demo"])
        found = int(coder.figures.firings.sum())
        _ = index.token_strings([0]), coder.frequency
        alive = np.flatnonzero(coder.alive)
        some = np.random.default_rng(options.seed + 1).choice(alive, min(options.reads, len(alive)), replace=False)
        densest = coder.ranking("frequency")[:DENSEST]
        return Size(
            found, adding + closing, closing, peak, len(index.description.segments), bytes_of(folder, found),
            {name: latencies(coder, some, read) for name, read in READS.items()},
            {name: latencies(coder, densest, read) for name, read in READS.items()},
        )  # fmt: skip


def show(sizes: list[Size]) -> None:
    """Print the tables."""
    header = ["", *(f"{size.postings / 1e6:.3g} M" for size in sizes)]
    built = [
        ["seconds to build", *(f"{size.seconds:.1f}" for size in sizes)],
        ["of these, closing", *(f"{size.closing:.1f}" for size in sizes)],
        ["ns a posting", *(f"{1e9 * size.seconds / size.postings:.0f}" for size in sizes)],
        ["peak memory, MiB", *(f"{size.peak_mib:.0f}" for size in sizes)],
        ["segments", *(f"{size.segments}" for size in sizes)],
    ]
    parts = ["values", "positions", "blocks", "statistics", "tokens and all else", "all"]
    weights = [[name, *(f"{size.bytes[name]:.2f}" for size in sizes)] for name in parts]
    print(f"\nBuilding\n\n{table(header, built)}\n\nBytes a posting on disk\n\n{table(header, weights)}")
    for title, which in (("random alive latents", "random"), (f"the {DENSEST} densest latents", "dense")):
        rows = [[name, *(_latency(getattr(size, which)[name]) for size in sizes)] for name in READS]
        print(f"\nMilliseconds, median / 95th percentile / worst over {title}\n\n{table(header, rows)}")


def _latency(figures: np.ndarray) -> str:
    return " / ".join(f"{figure:.2f}" for figure in figures)


def number(text: str) -> int:
    """`10M` → 10,000,000."""
    factor = {"k": 10**3, "m": 10**6, "g": 10**9}.get(text[-1:].lower(), 0)
    return int(float(text[:-1]) * factor) if factor else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postings", type=number, nargs="+", default=[10**6, 10**7], metavar="N")
    parser.add_argument("--scratch", help="folder to build in, for its disk (default: the system's temporary one)")
    for name, default in {
        "latents": 16384, "k": 32, "context": 128, "batch": 32, "reads": 200, "seed": 0, "budget-mib": 2048,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(f"{machine()}\n{options.latents} latents, k {options.k}, budget {options.budget_mib} MiB")
    sizes: list[Size] = []
    for postings in options.postings:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            sizes.append(pool.submit(measure, options, postings).result())
    show(sizes)


if __name__ == "__main__":
    main()
