"""One end-to-end KL step of a ReLU coder on a GPT-2-like model of two layers: ours and e2e_sae's, in turn.

    python -m benchmarks.e2e_step [--rounds 8] [--shape 128,2048,2048] [--vocabulary 50257] [--peer PYTHON]

PYTHON is the interpreter of an environment that has e2e_sae 2.1.1 (with --no-deps: its pins no longer fit together),
transformer_lens 2.16.1 and wandb. Without one, ours is measured alone. `ours bfloat16` has its model in bfloat16, which
is what `load_model` picks on a processor that computes in it; coders are float32 in any case.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks._timing import Spread, alternate, machine, speedup, table
from benchmarks._worker import Shape, Worker


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shape", default="128,2048,2048", help="d,F,tokens")
    parser.add_argument("--vocabulary", default="50257")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peer", type=Path)
    options = parser.parse_args()
    d, n_latents, tokens = (int(part) for part in options.shape.split(","))
    shape = Shape(d, n_latents, 1, tokens)
    own = (Path(sys.executable), "benchmarks.steps.e2e_ours")
    places = {"ours": (*own, options.vocabulary), "ours bfloat16": (*own, f"{options.vocabulary}:bfloat16")}
    if options.peer is not None:
        places["e2e_sae"] = (options.peer.absolute(), "benchmarks.steps.e2e_sae", options.vocabulary)
    workers: dict[str, Worker] = {}
    try:
        for name, (python, module, variant) in places.items():
            workers[name] = Worker(python, module, shape, variant, options.threads)
        times = alternate({name: worker.step for name, worker in workers.items()}, options.rounds)
        cpu = {name: worker.cpu[-options.rounds :] for name, worker in workers.items()}
        ended = {name: worker.stop() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    rows = [
        [
            name,
            speedup(times, name, "e2e_sae").show() if "e2e_sae" in times else "",
            speedup(cpu, name, "e2e_sae").show() if "e2e_sae" in times else "",
            Spread.of(times[name]).show(0, 1000),
            Spread.of(cpu[name]).show(0, 1000),
            f"{tokens / Spread.of(times[name]).median:,.0f}",
            f"{ended[name]['peak_mib'] - ended[name]['built_mib']:,.0f}",
        ]
        for name in times
    ]
    print(f"Measured on {machine()}; medians of {options.rounds} shuffled rounds (10th–90th percentile).\n")
    print(f"d {d}, F {n_latents:,}, {tokens:,} tokens a step, vocabulary {options.vocabulary}\n")
    header = ["", "times e2e_sae", "by CPU time", "ms a step", "CPU ms", "tokens/s", "MiB in steps"]
    print(table(header, rows))
    for name, worker in workers.items():
        print(f"- {name}: {worker.ready}")


if __name__ == "__main__":
    main()
