"""A contestant in a process of its own: it builds once, then runs one step for every line that it is sent.

The parent decides who runs when, so contestants in different environments can take turns, and each one's memory is its
own. One JSON object a line: the worker says `{"ready": …}`, then answers each `step` with `{"seconds": …}`, and `stop`
with its peak memory and how well its coder reconstructs a held-out batch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCHES = 8


@dataclass(frozen=True)
class Shape:
    """The size of a training step."""

    d: int
    n_latents: int
    k: int
    tokens: int

    def __str__(self) -> str:
        return f"d {self.d}, F {self.n_latents:,}, k {self.k}, {self.tokens:,} tokens"


class Contestant:
    """What a worker runs: `step(i)` does one full optimiser step, `reconstruct(x)` shows what was learnt.

    `note()` is what else is to be said at the end.
    """

    def __init__(
        self,
        step: Callable[[int], object],
        reconstruct: Callable[[Any], Any],
        versions: dict[str, str],
        note: Callable[[], str] = str,
    ):
        self.step, self.reconstruct, self.versions, self.note = step, reconstruct, versions, note


def activations(shape: Shape, seed: int = 0) -> Any:
    """`[BATCHES + 1, tokens, d]` float32: sparse sums of 2·F unit directions, noise and a mean; always the same."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * shape.n_latents, shape.d, generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    rows = (BATCHES + 1) * shape.tokens
    # Squaring a uniform draw makes some directions frequent and most rare, as latents of language are.
    chosen = (torch.rand(rows, shape.k, generator=generator).square() * len(directions)).long()
    weights = torch.rand(rows, shape.k, generator=generator) + 0.5
    x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
    x += 0.05 * torch.randn(rows, shape.d, generator=generator) + torch.randn(shape.d, generator=generator)
    return x.view(BATCHES + 1, shape.tokens, shape.d)


def serve(build: Callable[[Shape, str, Any], Contestant], make: Callable[[Shape, str], Any] | None = None) -> None:
    """The main function of a contestant's file: `build(shape, variant, training batches)`, then answer the parent.

    `make(shape, variant)` gives the batches and, as the last, the rows that are held out; by default `activations`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", default="")
    parser.add_argument("--threads", type=int, default=0)
    for field in ("d", "n_latents", "k", "tokens"):
        parser.add_argument(f"--{field}", type=int, required=True)
    options = parser.parse_args()
    shape = Shape(options.d, options.n_latents, options.k, options.tokens)
    # Libraries print while they work; the answers keep a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    data = activations(shape) if make is None else make(shape, options.variant)
    contestant = build(shape, options.variant, data[:-1])
    before = peak_mib()

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer(ready=contestant.versions | {"torch": torch.__version__}, threads=torch.get_num_threads())
    count = 0
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        start, cpu = time.perf_counter(), time.process_time()
        contestant.step(count)
        answer(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu)
        count += 1
    peak = peak_mib()
    with torch.no_grad():
        x = data[-1]
        wrong = (x - contestant.reconstruct(x)).square().sum()
        fvu = float(wrong / (x - x.mean(0)).square().sum())
    answer(peak_mib=peak, built_mib=before, fvu=fvu, steps=count, note=contestant.note())


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Worker:
    """The parent's end of a contestant."""

    def __init__(self, python: Path, module: str, shape: Shape, variant: str = "", threads: int = 0) -> None:
        sizes = [word for key, value in asdict(shape).items() for word in (f"--{key}", str(value))]
        self._process = subprocess.Popen(
            [str(python), "-m", module, *sizes, "--variant", variant, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Idle contestants must not spin while another one is measured.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
        )
        self.ready = self._read()
        self.cpu: list[float] = []

    def step(self) -> float:
        """Seconds of one optimiser step; the processor time of its threads together goes to `cpu`."""
        self._write("step")
        answer = self._read()
        self.cpu.append(float(answer["cpu"]))
        return float(answer["seconds"])

    def stop(self) -> dict[str, Any]:
        """End the worker; its peak memory and held-out FVU."""
        self._write("stop")
        result = self._read()
        self._process.communicate(timeout=60)
        return result

    def kill(self) -> None:
        """End the worker, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise RuntimeError(f"{self._process.args} ended:\n{errors[-2000:]}")
        return json.loads(line)
