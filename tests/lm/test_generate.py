"""Generation with a cache equals generation without one, spliced or not; seeds, stops, interventions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, ModelError, UnmixError
from unmix.lm import Ablate, Add, LanguageModel, generate

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


def test_sampled_text_equals_transformers_where_the_choice_is_forced() -> None:
    """top_k and repetition penalty against `generate` of transformers, greedily."""
    lm, tokens = tiny("llama"), some_tokens(2, 5)
    expected = lm.model.generate(
        tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, repetition_penalty=1.7
    )
    with lm.bind(PerfectCoder("layers.1", 16)) as bound:
        found = bound.generate_tokens(tokens, 12, repetition_penalty=1.7, **NEVER)
        forced = bound.generate_tokens(tokens, 12, repetition_penalty=1.7, temperature=2.0, top_p=1e-9, **NEVER)
    assert torch.equal(found, expected[:, 5:]) and torch.equal(forced, found)


@pytest.fixture
def written(tiny_tokenizer: Any) -> LanguageModel:
    """A tiny model with a tokenizer."""
    return LanguageModel(raw_model("llama", vocab_size=512).requires_grad_(False), "written", tiny_tokenizer)


def test_texts_of_a_batch_equal_those_alone(written: LanguageModel) -> None:
    prompts = ["The", "A longer prompt than the others", "Some words"]
    acts = [Add(latent=2, value=4.0, where="generated")]
    with written.bind(topk_coder("layers.1", 16)) as bound:
        options = {"interventions": acts, "temperature": 0.0, **NEVER}
        texts = bound.generate(prompts, 8, **options)
        assert texts == [bound.generate(prompt, 8, **options) for prompt in prompts]
        assert bound.generate([], 8) == []


def test_streamed_pieces_make_the_text(written: LanguageModel) -> None:
    """Also where a character is spread over several tokens."""
    with written.bind(topk_coder("layers.1", 16)) as bound:
        for seed in range(6):
            options = {"temperature": 3.0, "seed": seed, **NEVER}
            pieces = list(bound.stream_text("Some words", 20, **options))
            assert "".join(pieces) == bound.generate("Some words", 20, **options)
            assert len(pieces) > 5
            ids = list(bound.stream("Some words", 20, **options))
            assert written.decode(ids) == "".join(pieces)


def test_a_text_ends_before_its_stop_token(written: LanguageModel) -> None:
    with written.bind(topk_coder("layers.1", 16)) as bound:
        ids = list(bound.stream("Some words", 9, **NEVER))
        stop = ids[4]
        first = ids.index(stop)
        assert bound.generate("Some words", 9, stop_ids=[stop]) == written.decode(ids[:first])
        assert "".join(bound.stream_text("Some words", 9, stop_ids=[stop])) == written.decode(ids[:first])


def test_a_step_runs_one_token_whatever_was_written() -> None:
    """The cache is kept: model and coder see one position a step."""
    lm, tokens = tiny("llama"), some_tokens(1, 30)
    coder, seen = PerfectCoder("layers.1", 16), []
    encode = coder.encode
    coder.encode = lambda x: seen.append(x.shape[1]) or encode(x)  # type: ignore[method-assign]
    with lm.bind(coder, interventions=[Add(latent=1, value=1.0)]) as bound:
        bound.generate_tokens(tokens, 20, **NEVER)
    assert seen == [30, *[1] * 19]


def test_a_splice_of_the_prompt_alone_does_not_run_afterwards() -> None:
    lm, tokens = tiny("llama"), some_tokens(1, 6)
    coder, seen = LinearCoder("layers.1", 16), []
    encode = coder.encode
    coder.encode = lambda x: seen.append(x.shape[1]) or encode(x)  # type: ignore[method-assign]
    with lm.bind(coder, where="prompt") as bound, torch.no_grad():
        found = bound.generate_tokens(tokens, 6, **NEVER)
        assert seen == [6]
        context = tokens
        for _ in range(6):
            out = bound(context, prompt=6)
            context = torch.cat([context, out.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, context[:, 6:])


def test_longer_than_the_context_is_an_error_before_any_pass() -> None:
    lm = tiny("llama")
    with lm.bind(PerfectCoder("layers.1", 16)) as bound:
        with pytest.raises(ModelError, match="a prompt of 60 tokens and 6 new ones: tiny-llama takes at most 64"):
            bound.generate_tokens(some_tokens(1, 60), 6)
        with pytest.raises(ModelError, match="a context of 65 tokens: tiny-llama takes at most 64"):
            bound.generate_tokens(some_tokens(1, 65), 1)
        assert bound.generate_tokens(some_tokens(1, 60), 5, **NEVER).shape == (1, 5)


def test_a_text_longer_than_the_context_is_an_error_before_any_pass(written: LanguageModel) -> None:
    long = "Some words. " * 64
    says = r"a context of \d+ tokens: written takes at most 64"
    with written.bind(PerfectCoder("layers.1", 16)) as bound:
        for call in (bound, bound.raw, bound.generate, lambda text: written.capture(text, "embeddings")):
            with pytest.raises(ModelError, match=says):
                call(long)


def test_a_sentencepiece_text_keeps_the_space_it_begins_with() -> None:
    """Its decoder drops the space of whatever token comes first: the prompt's, and never the continuation's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{f"▁w{i}": i for i in range(1, 100)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    lm = LanguageModel(raw_model("llama"), "pieces", PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    with lm.bind(topk_coder("layers.1", 16)) as bound:
        ids = list(bound.stream("w7 w8", 4, **NEVER))
        expected = "".join(f" w{i}" if i else " <unk>" for i in ids)
        assert bound.generate(["w7 w8"], 4, **NEVER) == [expected]
        assert "".join(bound.stream_text("w7 w8", 4, **NEVER)) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"temperature": float("inf")}, "temperature is inf; it must be at least 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temprature": 1.0}, "unknown option of generation 'temprature'. Did you mean 'temperature'"),
        ({"interventions": [Ablate(latent=16)]}, "has latents 0 to 15"),
    ],
)
def test_options_are_checked_at_the_call(options: dict[str, Any], says: str) -> None:
    with tiny("llama").bind(PerfectCoder("layers.1", 16)) as bound:
        with pytest.raises(UnmixError, match=says):
            generate.stream(bound, some_tokens(), 3, **options)
        with pytest.raises(ConfigError, match="max_new_tokens is -1"):
            bound.generate_tokens(some_tokens(), -1)
