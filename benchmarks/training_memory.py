"""Peak memory of a few training steps of a wide coder, beside what its weights and Adam's moments take.

python -m benchmarks.training_memory                     # 131,072 latents of 768 dimensions, 4,096 tokens a step
python -m benchmarks.training_memory --latents 16384
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import torch

from unmix.coder.config import CoderConfig, TopK
from unmix.train.config import OptimConfig
from unmix.train.source import TensorSource
from unmix.train.trainer import Trainer


def peak() -> float:
    """The largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Train on random rows and print the peak after every step.

    A toy is trained first: the 90 MiB of code that torch loads with the first optimiser are not the coder's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=4096, help="a step")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    x = torch.randn(2 * options.tokens, options.width, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        toy = CoderConfig(d_in=options.width, n_latents=64, activation=TopK(k=8))
        trained(toy, x[:64], OptimConfig(batch=32, tokens=32, init_rows=32), Path(folder)).step()
    base = peak()
    coder = CoderConfig(d_in=options.width, n_latents=options.latents, activation=TopK(k=32))
    config = OptimConfig(batch=options.tokens, tokens=options.tokens * options.steps, init_rows=options.tokens)
    held = 3 * 2 * options.latents * options.width * 4 / 2**20
    print(f"weights and Adam's moments: {held:,.0f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(coder, x, config, Path(folder))
        for step in range(1, options.steps + 1):
            trainer.step()
            over = peak() - base
            print(f"after step {step}: {over:,.0f} MiB over the process without the coder", end=", ")
            print(f"{over - held:,.0f} of them beside weights and moments", flush=True)


def trained(coder: CoderConfig, x: torch.Tensor, config: OptimConfig, folder: Path) -> Trainer:
    """A trainer on these rows."""
    return Trainer(coder, TensorSource(x), config, folder, "memory")


if __name__ == "__main__":
    main()
