"""Whole runs, from a text file to a saved coder: ours, SAELens' runner and sparsify's trainer, in turn.

    python -m benchmarks.end_to_end [--rounds 5] [--shape 128,2048,32] [--tokens 262144] [--only ours,SAELens]

All start from one JSONL file and one folder with a small GPT-2-like model of two layers (random weights, a tokenizer of
8,192 tokens), in processes that have imported their libraries: counted are loading the model, cutting the text,
forward passes, training, saving. The model is float32 for everybody; `ours bfloat16` is what ours picks by itself on a
processor that has it. Peers run from the environment that `make peers` makes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._timing import Spread, alternate, machine, speedup, table
from benchmarks._worker import ROOT, Shape, Worker
from benchmarks.runs.materials import make

PEERS = ROOT / ".cache" / "peers" / "bin" / "python"


@dataclass(frozen=True)
class Entry:
    """One contestant: a module of `benchmarks.runs`, and what its variant says beside the folder."""

    name: str
    module: str
    variant: str = ""
    peer: bool = True


ENTRIES = (
    Entry("ours", "ours", ":float32", peer=False),
    Entry("ours bfloat16", "ours", ":bfloat16", peer=False),
    Entry("SAELens", "sae_lens"),
    Entry("sparsify signum", "sparsify", ":signum"),
    Entry("sparsify Adam", "sparsify", ":adam"),
)


def measure(shape: Shape, entries: list[Entry], folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Times, memory, held-out FVU and versions of every contestant that starts; why the others did not."""
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    try:
        for entry in entries:
            python = PEERS if entry.peer else Path(sys.executable)
            try:
                workers[entry.name] = Worker(
                    python, f"benchmarks.runs.{entry.module}", shape, f"{folder}{entry.variant}", threads
                )
                workers[entry.name].step()
            except (OSError, RuntimeError) as error:
                workers.pop(entry.name, None)
                absent[entry.name] = str(error).strip().splitlines()[-1]
        times = alternate({name: worker.step for name, worker in workers.items()}, rounds, warmup=0)
        ended = {name: worker.stop() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    cpu = {name: worker.cpu[-rounds:] for name, worker in workers.items()}
    versions = {name: worker.ready for name, worker in workers.items()}
    return {"times": times, "cpu": cpu, "ended": ended, "versions": versions, "absent": absent}


def report(result: dict[str, Any], tokens: int) -> str:
    """The result as Markdown."""
    times, cpu, ended = result["times"], result["cpu"], result["ended"]

    def ratios(found: dict[str, list[float]], name: str, base: str) -> str:
        return speedup(found, name, base).show() if base in found else ""

    bases = [name for name in ("SAELens", "sparsify signum") if name in times]
    rows = [
        [
            name,
            *(ratios(times, name, base) for base in bases),
            *(ratios(cpu, name, base) for base in bases),
            Spread.of(times[name]).show(1),
            Spread.of(cpu[name]).show(1),
            f"{tokens / Spread.of(times[name]).median:,.0f}",
            f"{ended[name]['peak_mib']:,.0f}",
            f"{ended[name]['fvu']:.3f}",
        ]
        for name in sorted(times, key=lambda name: Spread.of(times[name]).median)
    ]
    header = ["", *(f"times {b}" for b in bases), *(f"the same by CPU time, {b}" for b in bases)]
    lines = [table([*header, "seconds", "CPU seconds", "tokens/s", "peak MiB", "FVU held out"], rows), ""]
    lines += [f"- {name}: {', '.join(f'{k} {v}' for k, v in said['ready'].items())}, {said['threads']} threads"
              for name, said in result["versions"].items()]  # fmt: skip
    lines += [f"- {name}: {ended[name]['note']}" for name in times if ended[name].get("note")]
    lines += [f"- {name} did not start: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines)


def main() -> None:
    """Make the materials, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="128,2048,32", help="d,F,k")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--only", default="", help=f"some of: {', '.join(entry.name for entry in ENTRIES)}")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--materials", type=Path, help="keep model and text in this folder, and take them from there")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := set(wanted) - {entry.name for entry in ENTRIES}:
        parser.error(
            f"no such contestant: {', '.join(sorted(unknown))}; there are {', '.join(e.name for e in ENTRIES)}"
        )
    entries = [e for e in ENTRIES if (e.name in wanted if wanted else PEERS.exists() or not e.peer)]
    d, n_latents, k = (int(part) for part in options.shape.split(","))
    print(f"Measured on {machine()}; medians of {options.rounds} shuffled rounds (10th–90th percentile).\n")
    with tempfile.TemporaryDirectory(prefix="unmix-bench-") as temporary:
        folder = options.materials or Path(temporary)
        if not (folder / "held.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, d, options.tokens)
        shape = Shape(d, n_latents, k, options.tokens)
        result = measure(shape, entries, folder, options.rounds, options.threads)
    print(f"d {d}, F {n_latents:,}, k {k}, {options.tokens:,} tokens\n\n{report(result, options.tokens)}")
    if not PEERS.exists():
        print("The peers are not installed here: `make peers` makes their environment.")


if __name__ == "__main__":
    main()
