"""How fast a latent index is written and read, on a synthetic stream with Zipfian latents and tokens.

    python benchmarks/index.py                       # the demo's numbers: 4608 latents, k 32, 700k tokens
    python benchmarks/index.py --latents 131072 --budget-mib 256

The time to make the stream up is not counted. Peak memory is the whole process's.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmix.index.build import IndexBatch
from unmix.index.reader import CoderIndex, open_index
from unmix.index.writer import IndexWriter

VOCAB = 49152


@dataclass(frozen=True)
class ArrayCodes:
    """Codes as NumPy arrays; the writer reads tensors and arrays alike."""

    indices: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    n_latents: int


def zipf_shares(n: int, total: float, cap: float) -> np.ndarray:
    """`n` Zipfian shares that sum to `total`, none above `cap`."""
    shares = 1.0 / np.arange(1, n + 1)
    for _ in range(200):
        shares = np.minimum(shares * total / shares.sum(), cap)
    return shares


def stream(options: argparse.Namespace) -> Iterator[IndexBatch]:
    """Batches with exactly k distinct latents a token (systematic sampling with Zipfian inclusion probabilities)."""
    rng = np.random.default_rng(options.seed)
    F, k, ctx = options.latents, options.k, options.context
    cumulative = np.cumsum(zipf_shares(F, k, 0.6))
    cumulative *= k / cumulative[-1]
    names = rng.permutation(F).astype(np.int32)
    words = np.cumsum(zipf_shares(VOCAB, 1.0, 1.0))
    n_contexts = options.tokens // ctx
    for first in range(0, n_contexts, options.batch):
        size = min(options.batch, n_contexts - first)
        rows = size * ctx
        draws = np.arange(k) + rng.random((rows, 1))
        ids = names[np.minimum(np.searchsorted(cumulative, draws), F - 1)]
        ids.sort(axis=1)
        values = rng.lognormal(0.0, 0.6, rows * k).astype(np.float32)
        codes = ArrayCodes(ids.reshape(-1), values, np.arange(rows + 1, dtype=np.int64) * k, F)
        tokens = np.minimum(np.searchsorted(words, rng.random((size, ctx))), VOCAB - 1)
        mask = np.ones((size, ctx), bool)
        mask[:, 0] = False
        roles = rng.choice(4, size, p=(0.6, 0.1, 0.15, 0.15)).astype(np.uint8)
        documents = np.broadcast_to(np.arange(first, first + size, dtype=np.int32)[:, None], (size, ctx))
        yield IndexBatch(tokens, roles, documents, mask, {"demo": codes})


def build(folder: Path, options: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds spent taking batches, seconds closing, and processor seconds of both: those hardly feel other work."""
    vocab = [f"w{i}" for i in range(VOCAB)]
    adding = processor = 0.0
    writer = IndexWriter(
        folder, {"demo": options.latents}, options.context, vocab=vocab, budget_bytes=options.budget_mib * 2**20
    )
    with writer:
        for batch in stream(options):
            begin, used = time.perf_counter(), time.process_time()
            writer.add(batch.tokens, batch.roles, batch.documents, batch.mask, batch.codes)
            adding += time.perf_counter() - begin
            processor += time.process_time() - used
        begin, used = time.perf_counter(), time.process_time()
        writer.close()
        closing = time.perf_counter() - begin
        processor += time.process_time() - used
    return adding, closing, processor


def timed(reads: int, coder: CoderIndex, seed: int, read: Callable[[int], object]) -> tuple[float, float]:
    """Median and 95th percentile of milliseconds over random alive latents."""
    rng = np.random.default_rng(seed)
    alive = np.flatnonzero(coder.alive)
    times: list[float] = []
    for latent in rng.choice(alive, min(reads, len(alive)), replace=False):
        begin = time.perf_counter()
        read(int(latent))
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times), float(np.percentile(times, 95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "latents": 4608, "k": 32, "tokens": 700_000, "context": 128, "batch": 32, "reads": 200, "seed": 0,
        "budget-mib": 2048,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "index"
        adding, closing, processor = build(folder, options)
        index = open_index(folder)
        coder = index["demo"]
        _ = index.token_strings([0]), coder.frequency
        reads: dict[str, Callable[[int], object]] = {
            "top(20)": lambda i: coder[i].top(20),
            'top(20, role="explain")': lambda i: coder[i].top(20, role="explain"),
            'windows("quantiles", 40)': lambda i: coder[i].windows("quantiles", 40),
            'negatives("random", 40)': lambda i: coder[i].negatives("random", 40),
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{options.tokens} tokens, {options.latents} latents, k {options.k}, budget {options.budget_mib} MiB")
        print(f"{'build':<28}{adding + closing:9.2f} s      ({adding:.2f} adding, {closing:.2f} closing)")
        print(f"{'build, processor time':<28}{processor:9.2f} s")
        print(f"{'peak memory':<28}{peak:9.0f} MiB")
        print(f"{'on disk':<28}{size / 1e6:9.1f} MB")
        for name, read in reads.items():
            median, high = timed(options.reads, coder, options.seed + 1, read)
            print(f"{name:<28}{median:9.2f} ms     (95th percentile {high:.2f})")


if __name__ == "__main__":
    main()
