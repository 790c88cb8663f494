"""Ours. The variant is the number of layers; step `i` runs `kind_at(i)`."""

from __future__ import annotations

from typing import Any

from benchmarks._worker import Contestant, Shape, serve
from benchmarks.splices.same import coder_weights, gpt2, hook_layer, kind_at, mean_square, tokens


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """One forward pass, or one pass of the coder over the same number of tokens."""
    import torch

    import unmix
    from unmix.coder.config import CoderConfig, TopK
    from unmix.coder.sparse_coder import SparseCoder
    from unmix.lm import LanguageModel

    layers = int(variant or 12)
    hook = f"blocks.{hook_layer(layers)}.resid_pre"
    config = CoderConfig(
        reads=(hook,), d_in=shape.d, n_latents=shape.n_latents, activation=TopK(k=shape.k),
        input_policy=unmix.InputPolicy(bos="none", skip_first=0),
    )  # fmt: skip
    coder = SparseCoder.from_state(config, coder_weights(shape.d, shape.n_latents))
    coder.requires_grad_(False)
    lm = LanguageModel(gpt2(shape.d, layers), "gpt2")
    ids = tokens(shape.tokens)
    at_hook = lm.capture(ids, hook)[hook]

    @torch.no_grad()
    def forward() -> Any:
        return lm.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def alone() -> Any:
        return coder.decode(coder.encode(at_hook))

    @torch.no_grad()
    def spliced(error: Any) -> Any:
        with lm.bind(coder, error=error) as bound:
            return bound(ids).logits

    run = {"forward": forward, "coder": alone, "spliced": lambda: spliced("drop"), "kept": lambda: spliced("keep")}
    shown = {"unmix": unmix.__version__, **{kind: mean_square(run[kind]()) for kind in run if kind != "coder"}}
    return Contestant(lambda i: run[kind_at(i)](), lambda x: coder.decode(coder.encode(x)), shown)


if __name__ == "__main__":
    serve(build)
