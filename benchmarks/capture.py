"""How fast activations are captured, and what capture costs over the bare forward cut at the same layer.

    python benchmarks/capture.py --model builtin:smollm2 --layer 10 --dtypes bfloat16 float32 --batches 8 16 32 64

For each dtype and batch shape two things are run in turn, in a new random order each round: `lm.capture(tokens,
"layers.L")`, and a model that has only the first L + 1 blocks and no head. Tokens a second are medians over rounds,
with the quartiles beside them; `over bare` is the median of the rounds' time ratios, which a noisy machine moves less.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from unmix.lm import LanguageModel, load_model


def bare_model(lm: LanguageModel, layer: int) -> nn.Module:
    """The trunk with blocks 0 to `layer` and no final norm, sharing the weights."""
    trunk = copy.copy(lm.model.base_model)
    trunk._modules = dict(trunk._modules)
    name = next(n for n in ("layers", "h") if n in trunk._modules)
    trunk._modules[name] = nn.ModuleList(list(trunk._modules[name])[: layer + 1])
    for norm in ("norm", "ln_f", "final_layer_norm"):
        if norm in trunk._modules:
            trunk._modules[norm] = nn.Identity()
    # Blocks are found by number in the config; the copy must not change the original's.
    trunk.config = copy.copy(trunk.config)
    trunk.config.num_hidden_layers = layer + 1
    return trunk


def seconds(call: Callable[[], object], cpu_time: bool) -> float:
    """Time of one call, the card's work included: of the wall's clock, or CPU seconds for each thread."""
    clock = time.process_time if cpu_time else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / (torch.get_num_threads() if cpu_time else 1)


def measure(lm: LanguageModel, layer: int, batch: int, context: int, rounds: int, cpu_time: bool) -> str:
    """One line of the table."""
    tokens = torch.randint(3, lm.vocab_size, (batch, context), device=lm.device)
    bare, hook = bare_model(lm, layer), f"layers.{layer}"

    @torch.no_grad()
    def run_bare() -> torch.Tensor:
        return bare(input_ids=tokens, use_cache=False).last_hidden_state

    def run_capture() -> torch.Tensor:
        return lm.capture(tokens, hook)[hook]

    torch.testing.assert_close(run_capture(), run_bare())  # the same numbers, and a warm start
    times: dict[str, list[float]] = {"bare": [], "capture": []}
    for _ in range(rounds):
        calls = [("bare", run_bare), ("capture", run_capture)]
        random.shuffle(calls)
        for name, call in calls:
            times[name].append(seconds(call, cpu_time))
    ratio = statistics.median(c / b for c, b in zip(times["capture"], times["bare"], strict=True))
    columns = [str(lm.dtype).removeprefix("torch."), str(batch), str(context)]
    for name in ("bare", "capture"):
        speeds = [batch * context / t for t in times[name]]
        low, middle, high = statistics.quantiles(speeds, n=4)
        columns += [f"{middle:,.0f}", f"{low:,.0f}–{high:,.0f}"]
    return " | ".join([*columns, f"{100 * (ratio - 1):+.1f} %"])


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default=None)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for a machine that others share")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("dtype | batch | context | bare tokens/s | quartiles | capture tokens/s | quartiles | over bare")
    print("--- | --- | --- | --- | --- | --- | --- | ---")
    for dtype in options.dtypes:
        lm = load_model(options.model, dtype=dtype, device=options.device)
        for batch in options.batches:
            print(measure(lm, options.layer, batch, options.context, options.rounds, options.cpu_time), flush=True)


if __name__ == "__main__":
    main()
