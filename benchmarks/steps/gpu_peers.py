"""Steps of peers on a card, where they can be imported; each is made at its first call."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def peers(shape: Any, x: Tensor) -> dict[str, Callable[[], object]]:
    """By the name in the table."""
    found: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("sparsify") is not None:
        found["sparsify, Adam"] = _late(lambda: _sparsify(shape, x))
    if importlib.util.find_spec("sae_lens") is not None:
        found["SAELens TopK"] = _late(lambda: _sae_lens(shape, x))
    return found


def _late(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    made: list[Callable[[], object]] = []

    def step() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return step


def _sparsify(shape: Any, x: Tensor) -> Callable[[], object]:
    """Its own calls of one optimiser step, as in `benchmarks.steps.sparsify`; on the card, bfloat16 by autocast."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    config = SparseCoderConfig(num_latents=shape.n_latents, k=shape.k)
    coder = SparseCoder(shape.d, config, device="cuda", dtype=torch.float32)
    optimiser = torch.optim.Adam(coder.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", torch.bfloat16):
            out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return step


def _sae_lens(shape: Any, x: Tensor) -> Callable[[], object]:
    """Its own trainer object, as in `benchmarks.steps.sae_lens`, on the card with its autocast."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    coder = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=shape.d, d_sae=shape.n_latents, k=shape.k, device="cuda")).cuda()
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=shape.tokens, lr=1e-5, lr_end=1e-6, device="cuda",
        autocast=True,
    )  # fmt: skip
    trainer = SAETrainer(config, coder, iter(()))

    def step() -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step
