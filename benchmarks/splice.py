"""What a spliced top-k coder adds to a forward pass: ours, and TransformerLens with SAELens on the same weights.

    python -m benchmarks.splice [--rounds 8] [--shape 768,24576,32,512] [--layers 12] [--peer PYTHON]
    python -m benchmarks.splice --generate [--model builtin:smollm2]

The model is a GPT-2 with random weights, the coder a top-k coder at its middle block. Each library is a process of
its own, which runs four things in turn: the bare forward pass, the coder's encode and decode alone on the activations
of that pass, the spliced pass, and that with the coder's error kept. *added* is what a spliced pass takes beyond the
forward pass, *beyond* what it takes beyond forward and coder alone, as a share of the two; both are formed inside a
round. The mean squares of the logits are printed below: libraries that agree on them compute the same.

`--generate` times one token of a spliced generation after contexts of growing length.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

from benchmarks._timing import Spread, machine, table
from benchmarks._worker import Shape, Worker
from benchmarks.splices.same import KINDS, kind_at

Rounds = dict[str, list[float]]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shape", default="768,24576,32,512", help="d,F,k,tokens")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peer", type=Path, help="interpreter of an environment with sae-lens and transformer-lens")
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--model", default="builtin:smollm2")
    options = parser.parse_args()
    if options.generate:
        generation(options.model, options.rounds)
        return
    shape = Shape(*(int(part) for part in options.shape.split(",")))
    places = {"ours": (Path(sys.executable), "benchmarks.splices.ours")}
    if options.peer is not None:
        places["SAELens"] = (options.peer.absolute(), "benchmarks.splices.sae_lens")
    workers: dict[str, Worker] = {}
    try:
        for name, (python, module) in places.items():
            workers[name] = Worker(python, module, shape, str(options.layers), options.threads)
        wall, cpu = measure(workers, options.rounds)
    finally:
        for worker in workers.values():
            worker.kill()
    print(f"Measured on {machine()}; medians of {options.rounds} rounds (10th–90th percentile).\n")
    print(f"GPT-2 of {options.layers} layers, {shape}\n")
    header = ["", "ms", "CPU ms", "added CPU ms", "beyond", "beyond by CPU time"]
    rows = [row(name, kind, wall[name], cpu[name]) for name in workers for kind in KINDS]
    print(table(header, rows))
    for name, worker in workers.items():
        print(f"- {name}: {worker.ready}")


def measure(workers: dict[str, Worker], rounds: int) -> tuple[dict[str, Rounds], dict[str, Rounds]]:
    """Seconds by library and kind, of the clock and of the processor; libraries in a new order every round."""
    wall: dict[str, Rounds] = {name: {kind: [] for kind in KINDS} for name in workers}
    cpu: dict[str, Rounds] = {name: {kind: [] for kind in KINDS} for name in workers}
    generator, names = random.Random(0), list(workers)
    for turn in range(rounds + 1):
        generator.shuffle(names)
        for name in names:
            for place in range(len(KINDS)):
                seconds = workers[name].step()
                if turn:  # the first round warms up
                    kind = kind_at(turn * len(KINDS) + place)
                    wall[name][kind].append(seconds)
                    cpu[name][kind].append(workers[name].cpu[-1])
    return wall, cpu


def row(name: str, kind: str, wall: Rounds, cpu: Rounds) -> list[str]:
    """One line of the table."""
    cells = [f"{name} {kind}", Spread.of(wall[kind]).show(0, 1000), Spread.of(cpu[kind]).show(0, 1000)]
    if kind in ("forward", "coder"):
        return [*cells, "", "", ""]
    added = [whole - bare for whole, bare in zip(cpu[kind], cpu["forward"], strict=True)]
    return [*cells, Spread.of(added).show(0, 1000), beyond(wall, kind), beyond(cpu, kind)]


def beyond(times: Rounds, kind: str) -> str:
    """What `kind` takes beyond forward and coder alone, as a share of the two."""
    parts = zip(times[kind], times["forward"], times["coder"], strict=True)
    return f"{Spread.of([whole / (forward + coder) - 1 for whole, forward, coder in parts]).show(1, 100)} %"


def generation(model: str, rounds: int) -> None:
    """Milliseconds a token after contexts of growing length, with the cache that generation keeps."""
    import torch

    import unmix
    from unmix.coder.config import CoderConfig, TopK
    from unmix.lm.generate import stream

    lm = unmix.load_model(model, dtype="float32")
    hook = f"blocks.{lm.n_layers // 2}.resid_post"
    coder = unmix.SparseCoder(
        CoderConfig(reads=(hook,), d_in=lm.d_model, n_latents=8 * lm.d_model, activation=TopK(k=32))
    ).eval()
    act = unmix.Add(latent=3, value=4.0, where="generated")
    rows = []
    longest = (lm.max_context or 2048) - rounds - 2
    for length in (length for length in (16, 64, 256, 1024) if length <= longest):
        ids = torch.randint(3, lm.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        cells = [f"{length}"]
        for coders, acts in (((), [unmix.Steer(torch.zeros(lm.d_model), hook=hook)]), (coder, [act])):
            with lm.bind(coders, error="keep", interventions=acts) as bound:
                steps = stream(bound, ids, rounds + 2, stop_ids=())
                next(steps)  # the prompt
                taken = [timed(steps) for _ in range(rounds + 1)][1:]
            cells.append(f"{1000 * statistics.median(taken):.1f}")
        rows.append(cells)
    print(f"Measured on {machine()}; {lm.name}, medians of {rounds} tokens.\n")
    print(table(["context before", "bare ms a token", "spliced ms a token"], rows))


def timed(steps: object) -> float:
    """Seconds of the next step."""
    start = time.perf_counter()
    next(steps)  # pyright: ignore[reportArgumentType]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
