"""dictionary_learning's TopK trainer: its own `update`, whole."""

from __future__ import annotations

import sys
import types
from importlib.metadata import version
from typing import Any

from benchmarks._worker import Contestant, Shape, serve


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """Its trainer past step 0, at which it computes a geometric median once."""
    # The package imports its activation buffer, and that imports nnsight, which today's transformers breaks (and which
    # setup.sh therefore leaves out). The trainer measured here never touches either: an empty name is enough.
    sys.modules["nnsight"] = types.ModuleType("nnsight")
    sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=shape.d, dict_size=shape.n_latents, k=shape.k, layer=0, lm_name="benchmark",
        lr=8e-4, warmup_steps=1, seed=0, device="cpu",
    )  # fmt: skip
    trainer.ae.b_dec.data = batches[0].mean(0)
    return Contestant(
        lambda i: trainer.update(i + 1, batches[i % len(batches)]),
        trainer.ae,
        {"dictionary-learning": version("dictionary-learning")},
    )


if __name__ == "__main__":
    serve(build)
