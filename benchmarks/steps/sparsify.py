"""sparsify's TopK coder. Variants: `adam` and `signum` (its default optimiser).

Its trainer cannot be had without its loop over a language model, so this makes the calls of one optimiser step of that
loop on its own classes, in its order, without its gradient accumulation (one micro-batch).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from benchmarks._worker import Contestant, Shape, serve


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """Its coder with its own optimiser settings."""
    import torch
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    torch.manual_seed(0)
    coder = SparseCoder(shape.d, SparseCoderConfig(num_latents=shape.n_latents, k=shape.k), dtype=torch.float32)
    coder.b_dec.data = batches[0].mean(0)
    if variant == "adam":
        optimiser: Any = torch.optim.Adam(coder.parameters(), lr=8e-4)
    else:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        rate = 5e-3 / (shape.n_latents / 2**14) ** 0.5
        optimiser = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
        optimiser.train()
    since_fired = torch.zeros(shape.n_latents, dtype=torch.long)

    def step(i: int) -> None:
        x = batches[i % len(batches)]
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, total_variance=(x - x.mean(0)).pow(2).sum())
        float(out.fvu)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        fired = torch.zeros(shape.n_latents, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since_fired.add_(len(x))
        since_fired[fired] = 0

    return Contestant(step, lambda x: coder(x).sae_out, {"eai-sparsify": version("eai-sparsify")})


if __name__ == "__main__":
    serve(build)
