"""Our own step: `unmix.train.trainer.Trainer.step`, whole, on a source that holds its rows in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks._worker import Contestant, Shape, activations, serve


class Batches:
    """Hands the prepared batches out in turn, so that no contestant pays for shuffling."""

    hash = "benchmark"

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    @property
    def n_rows(self) -> int:
        """A long training: the schedule stays on its plateau."""
        return 10**9

    def batch(self, step: int, size: int) -> tuple[Any, Any]:
        """`(input, target)` `[tokens, d]`; the first call, before training, may ask for more or fewer rows."""
        x = self._batches[step % len(self._batches)]
        return x[:size], x[:size]


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """A TopK coder with the trainer's own defaults. The variant says how encoders score: `auto` or `exact`."""
    import unmix
    from unmix.coder.scoring import scoring
    from unmix.core.policy import InputPolicy
    from unmix.train.config import CoderSpec, OptimConfig
    from unmix.train.trainer import Trainer

    spec = CoderSpec(name="benchmark", hook="x", n_latents=shape.n_latents, k=shape.k)
    config = spec.build("x", "x", shape.d, shape.d, InputPolicy(), None)
    optim = OptimConfig(batch=shape.tokens, epochs=1, warmup=0, decay=0)
    trainer = Trainer(config, Batches(batches), optim, Path(tempfile.mkdtemp(prefix="unmix-bench-")), "benchmark")

    def reconstruct(x: Any) -> Any:
        trainer.coder.eval()
        return trainer.coder(x).reconstruction

    def step(i: int) -> None:
        with scoring("exact" if variant == "exact" else "auto"):
            trainer.step()

    return Contestant(step, reconstruct, {"unmix": unmix.__version__, "scoring": variant or "auto"})


def share(shape: Shape, steps: int) -> str:
    """How many of the rows that a training scores in bfloat16 have to be scored again in float32."""
    from unmix.coder.scoring import tally

    batches = activations(shape)[:-1]
    contestant = build(shape, "", batches)
    with tally() as counted:
        for i in range(steps):
            contestant.step(i)
    if not counted.rows:
        return "scored in float32 throughout"
    return f"{100 * counted.again / counted.rows:.1f} % of the rows scored again in float32, over {steps} steps"


if __name__ == "__main__":
    serve(build)
