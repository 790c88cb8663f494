"""One full optimiser step of a TopK coder: ours against the plain dense reference, and against peers where installed.

    python -m benchmarks.training_step [--rounds 12] [--shape 512,8192,32,4096] [--only ours,dense] [--json FILE]
    python -m benchmarks.training_step --rounds 2 --shape 768,131072,32,4096 --only ours   # peak memory of a wide coder

Peers run from the environment that `make peers` makes, each in a process of its own, on the same activations.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._timing import Spread, alternate, machine, speedup, table
from benchmarks._worker import ROOT, Shape, Worker
from benchmarks.steps.ours import share

SHAPES = ("128,2048,32,4096", "512,8192,32,4096")
PEERS = ROOT / ".cache" / "peers" / "bin" / "python"
BASE = "dense"


@dataclass(frozen=True)
class Entry:
    """One contestant: a module of `benchmarks.steps`, a variant of it, and whose environment runs it."""

    name: str
    module: str
    variant: str = ""
    peer: bool = True


ENTRIES = (
    Entry("ours", "ours", peer=False),
    Entry("ours exact", "ours", "exact", peer=False),
    Entry("dense", "dense", peer=False),
    Entry("SAELens", "sae_lens", "dense"),
    Entry("SAELens sparse", "sae_lens", "sparse"),
    Entry("sparsify Adam", "sparsify", "adam"),
    Entry("sparsify signum", "sparsify", "signum"),
    Entry("dictionary_learning", "dictionary_learning"),
)


def measure(shape: Shape, entries: list[Entry], rounds: int, threads: int) -> dict[str, Any]:
    """Times, memory, FVU and versions of every contestant that starts; why the others did not."""
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    try:
        for entry in entries:
            python = PEERS if entry.peer else Path(sys.executable)
            try:
                worker = Worker(python, f"benchmarks.steps.{entry.module}", shape, entry.variant, threads)
                worker.step()
                workers[entry.name] = worker
            except (OSError, RuntimeError) as error:
                absent[entry.name] = str(error).strip().splitlines()[-1]
        times = alternate({name: worker.step for name, worker in workers.items()}, rounds)
        ended = {name: worker.stop() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    versions = {name: worker.ready for name, worker in workers.items()}
    cpu = {name: worker.cpu[-rounds:] for name, worker in workers.items()}
    return {
        "shape": str(shape), "tokens": shape.tokens, "times": times, "cpu": cpu, "ended": ended,
        "versions": versions, "absent": absent, "share": share(shape, 3) if "ours" in workers else "",
    }  # fmt: skip


def report(result: dict[str, Any], base: str = BASE) -> str:
    """The result as Markdown."""
    times, ended = result["times"], result["ended"]
    base = base if base in times else next(iter(times))
    order = sorted(times, key=lambda name: Spread.of(times[name]).median)
    rows = [
        [
            name,
            speedup(times, name, base).show(),
            Spread.of(times[name]).show(0, 1000),
            Spread.of(result["cpu"][name]).show(0, 1000),
            f"{result['tokens'] / Spread.of(times[name]).median:,.0f}",
            f"{ended[name]['peak_mib']:,.0f}",
            f"{ended[name]['peak_mib'] - ended[name]['built_mib']:,.0f}",
            f"{ended[name]['fvu']:.3f}",
        ]
        for name in order
    ]
    header = ["", f"times {base}", "ms a step", "CPU ms", "tokens/s", "peak MiB", "of it in steps", "FVU after"]
    lines = [f"### {result['shape']}", "", table(header, rows), ""]
    lines += [f"- {name}: {', '.join(f'{k} {v}' for k, v in said['ready'].items())}, {said['threads']} threads"
              for name, said in result["versions"].items()]  # fmt: skip
    lines += [f"- ours: {result['share']}"] if result["share"] else []
    lines += [f"- {name} did not start: {why}" for name, why in result["absent"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure every shape asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shape", action="append", help="d,F,k,tokens (may be repeated)")
    parser.add_argument("--only", default="", help=f"some of: {', '.join(entry.name for entry in ENTRIES)}")
    parser.add_argument("--base", default=BASE, help="whose time the first column is measured against")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--json", type=Path, help="write every single measurement here too")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := set(wanted) - {entry.name for entry in ENTRIES}:
        parser.error(
            f"no such contestant: {', '.join(sorted(unknown))}; there are {', '.join(e.name for e in ENTRIES)}"
        )
    entries = [e for e in ENTRIES if (e.name in wanted if wanted else PEERS.exists() or not e.peer)]
    print(f"Measured on {machine()}; medians of {options.rounds} shuffled rounds (10th–90th percentile).\n")
    results = []
    for text in options.shape or SHAPES:
        results.append(
            measure(Shape(*(int(part) for part in text.split(","))), entries, options.rounds, options.threads)
        )
        print(report(results[-1], options.base), flush=True)
        print()
    if not PEERS.exists():
        print("The peers are not installed here: `make peers` makes their environment.")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
