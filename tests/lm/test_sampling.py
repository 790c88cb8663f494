"""Sampling restrictions against transformers' own, seeds of rows, counts of the context."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from unmix.core.errors import ConfigError
from unmix.lm.sampling import Sampler, Sampling, restricted

from .families import some_tokens

LOGITS = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
NOTHING = torch.empty(4, 0, dtype=torch.int64)


@pytest.mark.parametrize("k", [1, 5, 50, 80])
def test_top_k_is_transformers(k: int) -> None:
    assert torch.equal(restricted(LOGITS, k, None), TopKLogitsWarper(min(k, 50))(NOTHING, LOGITS))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_is_transformers(p: float) -> None:
    assert torch.equal(restricted(LOGITS, None, p), TopPLogitsWarper(p)(NOTHING, LOGITS))
    both = TopPLogitsWarper(p)(NOTHING, TopKLogitsWarper(9)(NOTHING, LOGITS))
    assert torch.equal(restricted(LOGITS, 9, p), both)


def test_repetition_penalty_is_transformers_and_counts_what_was_written() -> None:
    prompt = torch.tensor([[1, 2, 2], [3, 4, 5], [0, 0, 7], [8, 9, 1]])
    theirs = RepetitionPenaltyLogitsProcessor(5.0)
    sampler = Sampler(Sampling(repetition_penalty=5.0), prompt, None)
    context = prompt
    for step in range(4):
        logits = LOGITS.roll(step, dims=1)
        found = sampler(logits)
        assert torch.equal(found, theirs(context, logits).argmax(-1))
        context = torch.cat([context, found.unsqueeze(1)], dim=1)


def test_frequency_penalty_is_a_count_and_padding_is_not_counted() -> None:
    prompt = torch.tensor([[0, 0, 2, 2, 1]])
    real = torch.tensor([[False, False, True, True, True]])
    logits = torch.tensor([[1.0, 1.6, 2.0]])
    assert int(Sampler(Sampling(frequency_penalty=0.5), prompt, real)(logits)) == 1
    assert int(Sampler(Sampling(frequency_penalty=0.9), prompt, real)(logits)) == 0
    assert int(Sampler(Sampling(frequency_penalty=0.9), prompt, None)(logits)) == 1


def test_a_row_has_its_own_stream() -> None:
    """What a row draws does not depend on what stands beside it; equal prompts in one batch differ."""
    rule = Sampling(temperature=1.0, seed=3)
    tokens = some_tokens(4, 3)
    flat = torch.zeros(4, 1000)
    whole = Sampler(rule, tokens, None)(flat)
    assert int(Sampler(rule, tokens[:1], None)(flat[:1])) == int(whole[0])
    assert len(set(whole.tolist())) == 4


def test_drawn_tokens_follow_the_distribution() -> None:
    chances = torch.tensor([[0.5, 0.3, 0.2]])
    sampler = Sampler(Sampling(temperature=1.0), torch.zeros(1, 1, dtype=torch.int64), None)
    drawn = torch.cat([sampler(chances.log()) for _ in range(4000)])
    found = drawn.bincount(minlength=3) / 4000
    torch.testing.assert_close(found, chances[0], atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be at least 0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
    ],
)
def test_options_are_checked(options: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**options)
