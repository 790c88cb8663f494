"""The demo's real language model: kept errors, padded batches, a set and a target KL, as on the tiny ones."""

from __future__ import annotations

import pytest
import torch

import unmix
from unmix.coder.config import CoderConfig, TopK

pytestmark = pytest.mark.model


def test_the_demo_model_is_spliced_and_steered() -> None:
    lm = unmix.load_model("builtin:smollm2", dtype="float32")
    config = CoderConfig(reads=("blocks.14.resid_post",), d_in=576, n_latents=2048, activation=TopK(k=32))
    coder = unmix.SparseCoder(config).eval()
    prompts = ["The capital of France is", "Once upon a time there was a"]
    act = unmix.Add(latent=[5, 6], value=[600.0, -600.0], where="generated")
    policy = unmix.InputPolicy(bos="none", skip_first=1)
    with lm.bind(coder, error="keep", policy=policy) as bound, torch.no_grad():
        assert torch.equal(bound(prompts[0]).logits, bound.raw(prompts[0]))
        texts = bound.generate(prompts, 5, interventions=[act])
        assert texts == [bound.generate(prompt, 5, interventions=[act]) for prompt in prompts]
        assert texts[0] != bound.generate(prompts[0], 5)
        assert "".join(bound.stream_text(prompts[0], 5, interventions=[act])) == texts[0]
        assert "Paris" in bound.generate(prompts[0], 5)
        found = bound.steer_to_kl(prompts[0], [unmix.Steer(latent=9)], 0.1, tolerance=0.05)
        assert found.kl == pytest.approx(0.1, rel=0.05) and len(found.tried) < 25
    with lm.bind(coder, policy=policy) as bound, torch.no_grad():
        assert not torch.allclose(bound(prompts[0]).logits, bound.raw(prompts[0]), atol=1e-2)
