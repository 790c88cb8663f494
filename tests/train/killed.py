"""Trains in forked children that are killed at chosen moments and resumed; run as `python killed.py FOLDER CASE …`.

A case is `KIND:MOMENT[:MOMENT …]`: one child after another dies at its moment, the last one runs to the end. Writes
`FOLDER/CASE/final/` (a checkpoint) and `FOLDER/CASE/metrics.jsonl`. One process imports torch once for all of them.
Kinds are activations, optimisers, habits of the trainer, `group`: three coders on one stream, and `retire`: with a
fourth that fails and leaves.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unmix.core import atomic
from unmix.train import checkpoint, metrics_log
from unmix.train.checkpoint import save_checkpoint
from unmix.train.config import OptimConfig
from unmix.train.feeds import RowFeed
from unmix.train.source import TensorSource
from unmix.train.trainer import GroupTrainer, Job

from .toys import coder_config, planted

HABITS: dict[str, dict[str, Any]] = {"ema": {"ema": 0.9}, "resample": {"resample": (0.8, 0.9), "ema": 0.8}}
OPTIMISERS = ("signum", "schedule_free", "muon")


def die() -> None:
    """As the system kills: no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner: Any, name: str, calls: int, run: bool = True) -> None:
    """Die in the `calls`-th call of `owner.name`, once it is done (or, without `run`, before it begins)."""
    inner: Callable[..., Any] = getattr(owner, name)
    seen = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == calls and not run:
            die()
        result = inner(*args, **kwargs)
        if seen == calls:
            die()
        return result

    setattr(owner, name, counted)


def in_call(number: int) -> None:
    """Die when the `number`-th Python function is entered: between any two lines of the loop."""
    seen = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal seen
        if event == "call":
            seen += 1
            if seen == number:
                die()

    sys.setprofile(count)


def half_a_line(self: metrics_log.MetricsLog, record: dict[str, Any]) -> None:
    """The disk took the beginning of a line only."""
    with self.path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 6, "lo')
    die()


def arm(moment: str) -> None:
    """Set the trap: checkpoints fall on steps 7, 14, 21 and 28, log lines on every third step."""
    name, _, number = moment.partition("@")
    if name == "step":
        after(GroupTrainer, "group_step", int(number))
    elif name == "saving":
        after(checkpoint, "save_file", int(number))
    elif name == "renamed":
        after(atomic, "_take_place", int(number))
    elif name == "unrenamed":
        after(atomic, "_take_place", int(number), run=False)
    elif name == "forgetting":
        after(checkpoint.shutil, "rmtree", int(number), run=False)
    elif name == "call":
        in_call(int(number))
    elif name == "manifest":
        after(checkpoint, "write_manifest", int(number), run=False)
    elif name == "line":
        metrics_log.MetricsLog.write = half_a_line
    elif name != "never":
        raise ValueError(moment)


def jobs_of(kind: str) -> dict[str, Job]:
    """What a kind trains."""
    common: dict[str, Any] = {
        "batch": 32, "tokens": 960, "init_rows": 64, "lr": 5e-3, "checkpoint_every": 7, "log_every": 3,
        "dead_after": 64,
    }  # fmt: skip
    if kind == "group":
        one = jobs_of("topk")["topk"]
        two = jobs_of("jumprelu")["jumprelu"]
        small = OptimConfig(**{**common, "seed": 4, "lr": 1e-3, "optimiser": "signum"})
        return {"one": one, "two": two, "three": Job(coder_config("batchtopk", n=20, name="three"), small)}
    if kind == "retire":
        # From step 11 on the gradient of `bad` is infinite.
        terms = ({"term": "mse"}, {"term": "l1", "weight": 1e38, "start": 0.33})
        bad = OptimConfig(**common, objective=terms, retire=True)
        return {"bad": Job(coder_config("topk", name="bad"), bad), **jobs_of("group")}
    if kind in OPTIMISERS:
        own = {"optimiser": kind, **({"unit_norm": False} if kind == "schedule_free" else {})}
        return {kind: Job(coder_config("topk", n=48), OptimConfig(**common, **own))}
    if kind in HABITS:
        sparse = {**common, "sparsity": 5, "sparsity_warmup": 0.0, "lr": 2e-2, **HABITS[kind]}
        return {kind: Job(coder_config("relu", n=48, name=kind), OptimConfig(**sparse))}
    sparsity = 0.01 if kind in ("relu", "jumprelu") else 0.0
    return {kind: Job(coder_config(kind, n=48), OptimConfig(**common, sparsity=sparsity))}


def train(folder: Path, kind: str, moment: str) -> None:
    """One child's life."""
    arm(moment)
    trainer = GroupTrainer(jobs_of(kind), RowFeed(TensorSource(planted(400, 8, 12, 2)[0])), folder, "key")
    trainer.run()
    save_checkpoint(folder / "final", "key", trainer.parts())


def quicken() -> None:
    """What every child inherits: one thread, and no waiting for the disk."""
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # the disk is slow, and a killed process loses nothing that it wrote


def in_children(case: str, moments: Sequence[str], life: Callable[[str], None]) -> None:
    """`life(moment)` of every moment in a process of its own that must die there; then once more, to the end."""
    for moment in [*moments, "never"]:
        child = os.fork()
        if child == 0:
            life(moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if killed != (moment != "never") or (not killed and os.WEXITSTATUS(status)):
            raise SystemExit(f"{case}: the child of {moment!r} ended with status {status}")


def main(root: Path, cases: list[str]) -> None:
    """Every case, each child in a process of its own."""
    quicken()
    for kind in ("topk", "muon"):
        train(root / f"warm-{kind}", kind, "never")  # what torch imports late, once for all children
    for case in cases:
        kind, *moments = case.split(":")
        in_children(case, moments, partial(train, root / case, kind))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
