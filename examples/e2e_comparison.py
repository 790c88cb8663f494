"""What end-to-end training changes: a local coder, continued in several ways, and one table of what came of it.

    python examples/e2e_comparison.py [--out runs/e2e-comparison] [--local FILE] [--continued FILE]

Trains `examples/e2e-local.yaml` (as `unmix train` does), then the coders of `examples/e2e-comparison.yaml` from that
coder, and evaluates them (as `unmix evaluate` does); said again it goes on where it was stopped. Added here is what
pairs them: all are spliced, one at a time, into the same held-out contexts, and intervals, also of differences, are by
resampling those contexts (95 %, 1,000 resamples). Differences are from the first coder of the second file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unmix import SparseCoder
from unmix.core.atomic import write_json
from unmix.evaluate.contexts import Batch, choose, read_batch
from unmix.lm import LanguageModel
from unmix.lm.forward import put
from unmix.lm.start import find_start
from unmix.metrics.context_sums import ContextSums
from unmix.metrics.intervals import Estimate, bootstrap
from unmix.metrics.language import predictions, token_losses
from unmix.run.config import load_run
from unmix.run.context import RunContext
from unmix.run.stages import STAGES
from unmix.run.walk import walk

BATCH = 8
FILE = "comparison.json"


def measure(context: RunContext, coders: Mapping[str, SparseCoder], later: Sequence[str]) -> dict[str, Estimate]:
    """Of every coder, under `NAME figure`, and its difference from the first coder's under `NAME figure difference`.

    Figures: `ce_increase`, `kl`, `fvu`, `later` (error of later activations as a share of their variance, mean over
    hooks; of no hooks left out).
    """
    lm, shards = context.lm, context.shards
    ids = choose(shards, "evaluate", context.config.evaluate.tokens)
    hooks = {name: [coder.config.writes[0], *later] for name, coder in coders.items()}
    errors = [f"{name} error {hook}" for name in coders for hook in hooks[name]]
    sums = ContextSums(["predictions", "rows", "ce", *(f"{n} {f}" for n in coders for f in ("ce", "kl")), *errors])
    spread = Spread()
    for at in range(0, len(ids), BATCH):
        add(sums, lm, coders, read_batch(shards, ids[at : at + BATCH]), hooks, spread)
    column = {name: i for i, name in enumerate(sums.columns)}
    variance = spread.variances()

    def finish(total: Tensor) -> Mapping[str, Tensor]:
        def mean(name: str, per: str) -> Tensor:
            return total[..., column[name]] / total[..., column[per]]

        found: dict[str, Tensor] = {}
        for name in coders:
            own, *others = [mean(f"{name} error {hook}", "rows") / variance[hook] for hook in hooks[name]]
            found[f"{name} ce_increase"] = mean(f"{name} ce", "predictions") - mean("ce", "predictions")
            found[f"{name} kl"] = mean(f"{name} kl", "predictions")
            found[f"{name} fvu"] = own
            if others:
                found[f"{name} later"] = torch.stack(others).mean(0)
        first = next(iter(coders))
        gaps = {key: value - found[f"{first} {key.rpartition(' ')[2]}"] for key, value in found.items()}
        return found | {f"{key} difference": value for key, value in gaps.items()}

    return bootstrap(sums.table(), finish)


@torch.no_grad()
def add(
    sums: ContextSums,
    lm: LanguageModel,
    coders: Mapping[str, SparseCoder],
    batch: Batch,
    hooks: Mapping[str, Sequence[str]],
    spread: Spread,
) -> None:
    """One batch: the model as it is, then with each coder in place, begun behind the blocks that it does not touch."""
    reads = {name: coder.config.reads[0] for name, coder in coders.items()}
    starts = {hook: find_start(lm, [hook]) for hook in dict.fromkeys(reads.values())}
    looked = dict.fromkeys(hook for of_one in hooks.values() for hook in of_one)
    wanted = [*reads.values(), *looked, lm.last_hook, *(start.hook for start in starts.values() if start is not None)]
    bare = lm.run(
        batch.tokens, capture=list(dict.fromkeys(wanted)), documents=batch.documents, logits=False
    ).activations
    spread.add({hook: bare[hook][batch.mask] for hook in looked})
    streams, seen = {"original": bare[lm.last_hook]}, dict[str, Mapping[str, Tensor]]()
    for name, coder in coders.items():
        output = coder(bare[reads[name]][batch.mask].float()).reconstruction
        start = starts[reads[name]]
        seen[name] = lm.run(
            batch.tokens, {coder.config.writes[0]: put(output, batch.mask)},
            list(dict.fromkeys([*hooks[name], lm.last_hook])), batch.documents, logits=False,
            skip=None if start is None else start.skip(bare[start.hook]),
        ).activations  # fmt: skip
        streams[name] = seen[name][lm.last_hook]
    rows = {name: (lambda b, p, stream=stream: lm.unembed(stream[b, p])) for name, stream in streams.items()}
    losses = token_losses(batch.tokens, batch.mask, rows.pop("original"), rows)
    columns = {"predictions": torch.ones_like(losses["original"].ce), "ce": losses["original"].ce}
    errors = {"rows": torch.ones(int(batch.mask.sum()))}
    for name in coders:
        kl = losses[name].kl
        assert kl is not None
        columns |= {f"{name} ce": losses[name].ce, f"{name} kl": kl}
        for hook in hooks[name]:
            gap = seen[name][hook][batch.mask].double() - bare[hook][batch.mask].double()
            errors[f"{name} error {hook}"] = gap.square().sum(-1).cpu()
    for where, found in ((predictions(batch.mask), columns), (batch.mask, errors)):
        contexts = batch.context_of(where)
        values = torch.zeros(len(contexts), len(sums.columns), dtype=torch.float64)
        for key, value in found.items():
            values[:, sums.columns.index(key)] = value.double()
        sums.add(contexts, values)


class Spread:
    """Variance of some activations: mean squared distance of a row from the mean row."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Rows [n, d] of each hook."""
        for hook, x in rows.items():
            n, total, squares = self.sums.get(hook, (0, torch.zeros(()), torch.zeros(())))
            wide = x.double().cpu()
            self.sums[hook] = n + len(x), total + wide.sum(0), squares + wide.square().sum()

    def variances(self) -> dict[str, float]:
        """By hook."""
        return {
            hook: float(squares / n - (total / n).square().sum()) for hook, (n, total, squares) in self.sums.items()
        }


def table(context: RunContext, before: str, paired: Mapping[str, Estimate]) -> str:
    """Markdown: the coders of the run, and the one that they began as."""
    header = ["", "CE increase", "against the first", "KL", "FVU", "later layers' error", "L0", "fired", "dead"]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for name in [before, *context.members]:
        cells = [name, show(paired[f"{name} ce_increase"]), show(paired[f"{name} ce_increase difference"])]
        cells += [show(paired[f"{name} {figure}"]) for figure in ("kl", "fvu", "later") if f"{name} {figure}" in paired]
        if name in context.members:
            metrics = context.evaluations()[name]["metrics"]
            last = json.loads((context.training_folder / name / "metrics.jsonl").read_text().splitlines()[-1])
            cells += [f"{metrics['l0']['value']:.1f}", f"{metrics['alive_fraction']['value']:.3f}", f"{last['dead']:,}"]
        lines.append("| " + " | ".join([*cells, *[""] * (len(header) - len(cells))]) + " |")
    return "\n".join(lines)


def show(found: Estimate) -> str:
    """`0.143 [0.135, 0.151]`."""
    if found.value is None or found.low is None or found.low == found.high:
        return "–" if found.value is None else f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def downstream_hooks(context: RunContext) -> list[str]:
    """Hooks that some coder's `downstream` looks at."""
    terms = [spec for member in context.members.values() for spec in member.train.objective or ()]
    return [context.lm.hook(h).name for h in dict.fromkeys(h for t in terms for h in getattr(t, "hooks", ()))]


def main() -> None:
    """Train, continue, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/e2e-comparison"))
    parser.add_argument("--local", default="examples/e2e-local.yaml")
    parser.add_argument("--continued", default="examples/e2e-comparison.yaml")
    options = parser.parse_args()
    first, _ = walk(load_run(options.local, {"out": str(options.out / "local")}), STAGES, "train")
    place = {"train.start_from": str(first.coder_folder(first.coder_name)), "out": str(options.out / "continued")}
    context, _ = walk(load_run(options.continued, place), STAGES, "evaluate")
    paired = measure(context, {**context.coders, first.coder_name: first.coder}, downstream_hooks(context))
    write_json(options.out / FILE, {name: found.as_dict() for name, found in paired.items()})
    held = next(iter(context.evaluations().values()))["settings"]
    sys.stdout.write(f"{held['predictions']:,} predictions in {held['contexts']} held-out contexts\n\n")
    sys.stdout.write(table(context, first.coder_name, paired) + "\n")


if __name__ == "__main__":
    main()
