"""What building a latent index costs beside the model's forward passes and the encoding that feed it.

    python -m benchmarks.index_overhead                                # SmolLM2's block 10, 4,608 and 24,576 latents
    python -m benchmarks.index_overhead --tokens 500k --k 64

One build of each size, through the same door as `unmix index`. The source is timed from inside: what passes between two
batches is the model and the coder (`source`), everything else the index (checks, sorting, segments, statistics, tokens,
hashes). Processor time moves less than the clock where other work runs on the machine. Coders have random weights: TopK
fires as often as it says, on whatever it happens to.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks._timing import machine, table
from unmix.coder.config import CoderConfig, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.config import parse_count
from unmix.data.config import DataConfig
from unmix.data.tokenise import tokenise
from unmix.index.batch import IndexBatch
from unmix.index.building import build
from unmix.index.sources.live import LiveSource
from unmix.lm import load_model


class Timed(LiveSource):
    """Counts the seconds spent in making batches."""

    clock = processor = 0.0

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        """As they come, with the time they took."""
        made = super().batches(first, last)
        while True:
            begun, used = time.perf_counter(), time.process_time()
            batch = next(made, None)
            self.clock += time.perf_counter() - begun
            self.processor += time.process_time() - used
            if batch is None:
                return
            yield batch


def random_coder(hook: str, d: int, n_latents: int, k: int) -> SparseCoder:
    """A TopK coder that nobody trained."""
    torch.manual_seed(0)
    coder = SparseCoder(CoderConfig(reads=(hook,), d_in=d, d_out=d, n_latents=n_latents, activation=TopK(k=k)))
    with torch.no_grad():
        coder.W_enc.normal_()
    return coder


def measure(source: Timed, folder: Path) -> list[str]:
    """One row: a build, and what of it was the source."""
    begun, used = time.perf_counter(), time.process_time()
    index = build(folder, lambda: source)
    clock, processor = time.perf_counter() - begun, time.process_time() - used
    assert index is not None
    coder = index.coder()
    firings = int(coder.figures.firings.sum())
    return [
        f"{coder.n_latents:,}", f"{firings / index.n_tokens:.0f}", f"{index.n_tokens:,}",
        f"{1e6 * source.processor / index.n_tokens:.0f}", f"{1e9 * (processor - source.processor) / firings:.0f}",
        f"{(processor - source.processor) / source.processor:.1%}", f"{(clock - source.clock) / source.clock:.1%}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--hook", default="layers.10")
    parser.add_argument("--data", default="builtin:python-docs")
    parser.add_argument("--tokens", type=parse_count, default=100_000)
    parser.add_argument("--latents", type=parse_count, nargs="+", default=[4608, 24576])
    parser.add_argument("--k", type=int, nargs="+", default=[32, 64])
    options = parser.parse_args()
    lm = load_model(options.model)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shards = tokenise(DataConfig(source=options.data, tokens=options.tokens), lm.tokenizer, place / "tokens")
        d = lm.capture("width", options.hook)[options.hook].shape[-1]
        hook = lm.hook(options.hook).name
        rows: list[list[str]] = []
        for n_latents in options.latents:
            for k in options.k:
                source = Timed(lm, shards, {"random": random_coder(hook, d, n_latents, k)})
                rows.append(measure(source, place / f"{n_latents}-{k}"))
    print(machine())
    print(f"{options.model} {options.hook}, {lm.dtype}, {torch.get_num_threads()} threads\n")
    header = ["latents", "L0", "tokens", "source, µs a token", "index, ns a posting", "index / source, CPU", "by clock"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
