"""Generation with a cache equals generation without one, spliced or not; seeds, stops, interventions."""

from __future__ import annotations

import pytest
import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError
from unmix.lm import Ablate, Add, LanguageModel

from .fakes import LinearCoder, PerfectCoder, topk_coder
from .families import raw_model, some_tokens, tiny

NEVER = {"stop_ids": ()}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "gemma3", "opt"])
def test_greedy_text_equals_full_reruns(family: str) -> None:
    """Also past a sliding window of 4 (mistral, gemma3)."""
    lm, tokens = tiny(family), some_tokens(2, 5)
    coder = LinearCoder("layers.1", 16)
    act = Add(latent=2, value=4.0, where="generated")
    with lm.bind(coder) as bound, torch.no_grad():
        found = bound.generate_tokens(tokens, 6, interventions=[act], **NEVER)
        context = tokens
        for _ in range(6):
            places = list(range(5, context.shape[1]))
            out = bound(context, interventions=[Add(latent=2, value=4.0, where=places)])
            context = torch.cat([context, out.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, context[:, 5:])


def test_a_coder_that_looks_back_sees_the_whole_context_at_every_step() -> None:
    """A temporal coder's codes of a token depend on the tokens before; a cache must not hide them."""
    lm, tokens = tiny("llama"), some_tokens(2, 5)
    rule = {"kind": "temporal", "k": 4, "n_heads": 2, "bottleneck": 4, "z_scale": 1.0}
    coder = SparseCoder(CoderConfig(reads=("blocks.1.resid_post",), d_in=16, n_latents=32, activation=rule)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in coder.parameters():
            # Biases would drown what differs from token to token.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (parameter.ndim > 1))
    with lm.bind(coder) as bound, torch.no_grad():
        found = bound.generate_tokens(tokens, 6, **NEVER)
        context = tokens
        for _ in range(6):
            context = torch.cat([context, bound(context).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, context[:, 5:])


def test_a_perfect_coder_generates_what_transformers_does() -> None:
    lm, tokens = tiny("llama"), some_tokens(1, 5)
    expected = lm.model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    with lm.bind(PerfectCoder("layers.1", 16)) as bound:
        assert torch.equal(bound.generate_tokens(tokens, 8, **NEVER), expected[:, 5:])


def test_seeds_and_temperature() -> None:
    lm, tokens = tiny("llama"), some_tokens(1, 5)
    with lm.bind(topk_coder("layers.1", 16)) as bound:

        def draw(**options: object) -> list[int]:
            return bound.generate_tokens(tokens, 12, **NEVER, **options)[0].tolist()

        state = torch.random.get_rng_state()
        assert draw(temperature=3.0, seed=1) == draw(temperature=3.0, seed=1) != draw(temperature=3.0, seed=2)
        assert torch.equal(state, torch.random.get_rng_state())
        assert draw(temperature=3.0, top_k=1, seed=5) == draw()


def test_rows_stop_by_themselves() -> None:
    lm, tokens = tiny("llama"), some_tokens(2, 5)
    with lm.bind(PerfectCoder("layers.1", 16)) as bound:
        free = bound.generate_tokens(tokens, 6, **NEVER)
        stop = int(free[0, 2])
        stopped = bound.generate_tokens(tokens, 6, stop_ids=[stop])
        first = free[0].tolist().index(stop)
        assert stopped[0, : first + 1].tolist() == free[0, : first + 1].tolist()
        assert set(stopped[0, first:].tolist()) == {stop}
        assert bound.generate_tokens(tokens, 0).shape == (2, 0)


def test_an_intervention_on_the_prompt_stays_in_the_cache() -> None:
    lm, tokens = tiny("llama"), some_tokens(1, 6)
    coder = LinearCoder("layers.0", 16, latents=12)
    with lm.bind(coder) as bound:
        plain = bound.generate_tokens(tokens, 6, **NEVER)
        on_prompt = [Add(latent=i, value=9.0, where="prompt") for i in range(12)]
        assert not torch.equal(bound.generate_tokens(tokens, 6, interventions=on_prompt, **NEVER), plain)
        nowhere = [Ablate(latent=0, where=[60])]
        assert torch.equal(bound.generate_tokens(tokens, 6, interventions=nowhere, **NEVER), plain)


def test_a_model_without_a_cache_reruns_the_whole_context() -> None:
    """A module that takes ids and returns logits, nothing else."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = raw_model("llama")

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids=tokens, use_cache=False).logits

    class Words:
        bos_token_id, eos_token_id = None, None

        def __len__(self) -> int:
            return 100

    wrapped, tokens = LanguageModel(Plain(), "plain", Words()), some_tokens(1, 5)
    with wrapped.bind(PerfectCoder("inner.model.layers.1@out", 16)) as bound:
        found = bound.generate_tokens(tokens, 5)
    with tiny("llama").bind(PerfectCoder("layers.1", 16)) as bound:
        assert torch.equal(found, bound.generate_tokens(tokens, 5, **NEVER))


def test_options_are_checked() -> None:
    with (
        tiny("llama").bind(PerfectCoder("layers.1", 16)) as bound,
        pytest.raises(ConfigError, match="top_k at least 1"),
    ):
        bound.generate_tokens(some_tokens(), 3, top_k=0)
