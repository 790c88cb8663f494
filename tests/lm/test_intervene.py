"""Interventions against dense arithmetic; adding a latent lengthens its row and evicts nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError, ModelError
from unmix.lm import Ablate, Add, Clamp, Intervention, Multiply, Set
from unmix.lm.intervene import Span, apply_all

from .fakes import LinearCoder, topk_coder
from .families import some_tokens, tiny

ACTS = [
    (Set(latent=3, value=8.0), lambda x: torch.full_like(x, 8.0)),
    (Set(latent=3, value=0.0), torch.zeros_like),
    (Add(latent=3, value=-2.0), lambda x: x - 2.0),
    (Multiply(latent=3, factor=0.5), lambda x: x * 0.5),
    (Ablate(latent=3), torch.zeros_like),
    (Clamp(latent=3, minimum=0.25), lambda x: x.clamp(min=0.25)),
    (Clamp(latent=3, minimum=-0.5, maximum=0.5), lambda x: x.clamp(-0.5, 0.5)),
]


@given(
    st.integers(0, 10_000), st.sampled_from(range(len(ACTS))), st.booleans(),
    st.sampled_from(["all", "prompt", "generated", (0, 4)]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_intervention_equals_dense_arithmetic(seed: int, which: int, topk: bool, where: object) -> None:
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(2, 5, 6, generator=random)
    if topk:
        values, indices = dense.view(10, 6).topk(2)
        codes = Codes.from_topk(indices, values, 6, (2, 5))
    else:
        codes = Codes.from_dense(torch.where(dense > 0.3, dense, 0.0))
    before = codes.dense()
    act, change = ACTS[which]
    act = type(act)(**{**act.__dict__, "where": where})
    after = apply_all(codes, [act], 2, Span(start=0, length=5, prompt=3))
    places = {"all": [0, 1, 2, 3, 4], "prompt": [0, 1, 2], "generated": [3, 4], (0, 4): [0, 4]}[where]
    expected = before.clone()
    expected[:, places, 3] = change(before[:, places, 3])
    torch.testing.assert_close(after.dense(), expected)
    for row in range(10):
        indices, _ = after.row(row)
        assert (indices.diff() > 0).all()
        assert set(codes.row(row)[0].tolist()) <= set(indices.tolist())
    if after.uniform_k is not None:
        assert (after.offsets.diff() == after.uniform_k).all()


def test_adding_a_latent_to_every_row_keeps_the_topk_view() -> None:
    codes = Codes.from_topk(torch.tensor([[0, 2], [1, 4]]), torch.ones(2, 2), 6)
    grown = apply_all(codes, [Set(latent=3, value=5.0)], 1, Span(0, 2, 2))
    assert grown.uniform_k == 3
    indices, values = grown.topk_view()
    assert indices.tolist() == [[0, 2, 3], [1, 3, 4]]
    assert values.tolist() == [[1.0, 1.0, 5.0], [1.0, 5.0, 1.0]]


def test_places_count_from_the_start_of_the_context_when_a_cache_holds_the_rest() -> None:
    codes = Codes.from_dense(torch.ones(1, 1, 4))
    later = Span(start=6, length=1, prompt=4)
    assert apply_all(codes, [Ablate(latent=0, where=[6])], 1, later).dense().view(-1).tolist() == [0, 1, 1, 1]
    assert apply_all(codes, [Ablate(latent=0, where=[0])], 1, later) is codes
    assert apply_all(codes, [Ablate(latent=0, where="prompt")], 1, later) is codes


def test_gradients_flow_through_what_was_not_touched() -> None:
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    codes = Codes.from_topk(torch.tensor([[0, 2]]), values, 4)
    acts = [Set(latent=1, value=3.0), Multiply(latent=2, factor=4.0)]
    apply_all(codes, acts, 1, Span(0, 1, 1)).dense().sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1.0, 4.0]]


def test_an_intervention_moves_the_stream_by_its_decoder_row() -> None:
    lm, tokens, hook = tiny("llama"), some_tokens(), "blocks.1.resid_post"
    coder = LinearCoder(hook, 16)
    for error in ("drop", "keep"):
        with lm.bind(coder, error=error) as bound, torch.no_grad():
            plain = bound(tokens, capture=[hook]).activations[hook]
            acts = [Add(latent=2, value=3.0, where=[4, 5])]
            moved = bound(tokens, capture=[hook], interventions=acts).activations[hook]
        expected = torch.zeros_like(plain)
        expected[:, 4:6] = 3.0 * coder.V[2].detach()
        torch.testing.assert_close(moved - plain, expected, atol=1e-5, rtol=1e-5)


def test_the_bindings_own_interventions_hold_for_every_pass() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    coder = topk_coder("layers.1", 16)
    with lm.bind(coder, interventions=[Set(latent=7, value=9.0)]) as bound, torch.no_grad():
        for _ in range(2):
            codes = bound(tokens).codes["layers.1"]
            assert (codes.dense()[..., 7] == 9.0).all()
        both = bound(tokens, interventions=[Add(latent=7, value=1.0)]).codes["layers.1"]
    assert (both.dense()[..., 7] == 10.0).all()
    assert coder.decode(codes).shape == (2, 9, 16)


def test_interventions_find_their_coder() -> None:
    lm = tiny("llama")
    coders = {"a": topk_coder("layers.0", 16), "b": topk_coder("layers.1", 16)}
    with lm.bind(coders) as bound, torch.no_grad():
        out = bound(some_tokens(), interventions=[Set(latent=7, value=9.0, coder="b")])
        assert (out.codes["b"].dense()[..., 7] == 9.0).all()
        assert not (out.codes["a"].dense()[..., 7] == 9.0).any()
        with pytest.raises(ModelError, match="several coders are bound; name one of a, b"):
            bound(some_tokens(), interventions=[Set(latent=7, value=9.0)])
        with pytest.raises(ModelError, match="no coder 'c' is bound; bound: a, b"):
            bound(some_tokens(), interventions=[Set(latent=7, value=9.0, coder="c")])


def test_a_latent_out_of_range() -> None:
    with (
        pytest.raises(ModelError, match=r"coder .layers\.1. has latents 0 to 23"),
        tiny("llama").bind(topk_coder("layers.1", 16), interventions=[Ablate(latent=24)]),
    ):
        pass


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Clamp(latent=0), "Clamp needs a minimum, a maximum or both"),
        (lambda: Clamp(latent=0, minimum=2.0, maximum=1.0), "minimum 2.0 is above maximum 1.0"),
        (lambda: Ablate(latent=-1), "latent is -1; latents count from 0"),
        (lambda: Intervention.check_where("later"), "where is 'later'; allowed: all, prompt, generated, or a list"),
    ],
)
def test_interventions_are_checked_when_made(build: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build()  # type: ignore[operator]
