"""SAELens' TopK trainer. Variants: `dense` (its default) and `sparse` (its option, without the norm rescaling)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from benchmarks._worker import Contestant, Shape, serve


def build(shape: Shape, variant: str, batches: Any) -> Contestant:
    """Its own trainer object, stepped from outside, as its multi-coder trainer does."""
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sparse = variant == "sparse"
    coder = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=shape.d,
            d_sae=shape.n_latents,
            k=shape.k,
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
        )
    )
    with torch.no_grad():
        coder.b_dec.copy_(batches[0].mean(0))
    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=shape.tokens, lr=8e-4, lr_end=8e-5)
    trainer = SAETrainer(config, coder, iter(()))

    def step(i: int) -> None:
        trainer.step(batches[i % len(batches)])
        trainer.n_training_steps += 1

    return Contestant(step, coder, {"sae-lens": version("sae-lens")})


if __name__ == "__main__":
    serve(build)
