"""Our end-to-end step: the bare pass, the spliced pass, KL with an L1 penalty, backward, clip, Adam."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks._worker import Contestant, Shape, serve
from benchmarks.steps.e2e_model import CONTEXT, SIZES, tokens


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """A ReLU coder behind the first of two blocks; the variant is the vocabulary's size, and `:bfloat16` if wanted."""
    import torch
    import transformers

    import unmix
    from unmix.core.policy import InputPolicy
    from unmix.lm import LanguageModel
    from unmix.lm.contexts import TokenTensor
    from unmix.train.config import CoderSpec, OptimConfig
    from unmix.train.spliced import SplicedFeed
    from unmix.train.trainer import GroupTrainer, Job

    size, _, dtype = (variant or "50257").partition(":")
    vocabulary = int(size)
    config = transformers.GPT2Config(
        n_embd=shape.d, n_layer=SIZES["layers"], n_head=SIZES["heads"], n_positions=CONTEXT, vocab_size=vocabulary
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False).to(getattr(torch, dtype or "float32"))
    lm = LanguageModel(model, "gpt2-like")
    policy = InputPolicy(bos="none", skip_first=0)
    data = TokenTensor(tokens(shape.tokens, vocabulary).flatten(0, 1), policy)
    hook = "blocks.0.resid_post"
    spec = CoderSpec(name="benchmark", hook=hook, n_latents=shape.n_latents, activation="relu")
    coder = spec.build(hook, hook, shape.d, shape.d, policy, None)
    optim = OptimConfig(
        batch=shape.tokens, tokens=10**9, warmup=0, decay=0, init_rows=shape.tokens, unit_norm=True,
        objective=({"term": "kl"}, {"term": "l1", "weight": 1e-3}),
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="unmix-bench-"))
    trainer = GroupTrainer({"a": Job(coder, optim)}, SplicedFeed(lm, data, {"a": coder}, 0), folder, "benchmark")

    def reconstruct(x: Any) -> Any:
        return trainer.learners["a"].coder.eval()(x).reconstruction

    versions = {"unmix": unmix.__version__, "transformers": transformers.__version__}
    return Contestant(lambda i: trainer.group_step(), reconstruct, versions)


if __name__ == "__main__":
    serve(build)
