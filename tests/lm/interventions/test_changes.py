"""Interventions against dense arithmetic; adding a latent lengthens its row and evicts nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.fakes import LinearCoder, topk_coder
from lm.families import some_tokens, tiny
from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError, DataError, ModelError
from unmix.lm import Ablate, Add, Clamp, Fires, LatentDistribution, Multiply, Set, measure_latents
from unmix.lm.interventions.changes import LatentFacts, apply_all
from unmix.lm.interventions.places import Span, checked_range

ACTS = [
    (Set(latent=3, value=8.0), lambda x: torch.full_like(x, 8.0)),
    (Set(latent=3, value=0.0), torch.zeros_like),
    (Add(latent=3, value=-2.0), lambda x: x - 2.0),
    (Multiply(latent=3, factor=0.5), lambda x: x * 0.5),
    (Ablate(latent=3), torch.zeros_like),
    (Clamp(latent=3, minimum=0.25), lambda x: x.clamp(min=0.25)),
    (Clamp(latent=3, minimum=-0.5, maximum=0.5), lambda x: x.clamp(-0.5, 0.5)),
    (Ablate(latent=3, to=0.7), lambda x: torch.full_like(x, 0.7)),
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


@given(st.integers(0, 10_000), st.permutations(range(6)), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_several_latents_with_a_value_each(seed: int, order: list[int], n: int) -> None:
    """One intervention on n latents is n interventions on one, in any order."""
    random = torch.Generator().manual_seed(seed)
    codes = Codes.from_dense(torch.randn(2, 5, 6, generator=random).clamp(min=0))
    latents, numbers = order[:n], [float(10 + i) for i in range(n)]
    span = Span(0, 5, 3)
    for many, one in [
        (Set(latent=latents, value=numbers), [Set(latent=i, value=v) for i, v in zip(latents, numbers)]),
        (Add(latent=latents, value=numbers), [Add(latent=i, value=v) for i, v in zip(latents, numbers)]),
        (Multiply(latent=latents, factor=numbers), [Multiply(latent=i, factor=v) for i, v in zip(latents, numbers)]),
        (Ablate(latent=latents), [Ablate(latent=i) for i in latents]),
        (Ablate(latent=latents, to=numbers), [Ablate(latent=i, to=v) for i, v in zip(latents, numbers)]),
        (
            Clamp(latent=latents, minimum=0.25, maximum=numbers),
            [Clamp(latent=i, minimum=0.25, maximum=v) for i, v in zip(latents, numbers)],
        ),
    ]:
        together, apart = apply_all(codes, [many], 2, span), apply_all(codes, one, 2, span)
        assert torch.equal(together.dense(), apart.dense())
        together.check()
    one_for_all = apply_all(codes, [Set(latent=latents, value=2.0)], 2, span)
    assert (one_for_all.dense()[..., latents] == 2.0).all()


def test_order_counts() -> None:
    codes = Codes.from_dense(torch.tensor([[1.0, 0.0]]))
    span = Span(0, 1, 1)
    first = apply_all(codes, [Add(latent=0, value=1.0), Multiply(latent=0, factor=3.0)], 1, span)
    other = apply_all(codes, [Multiply(latent=0, factor=3.0), Add(latent=0, value=1.0)], 1, span)
    assert (first.dense()[0, 0], other.dense()[0, 0]) == (6.0, 4.0)


def test_an_evicting_latent_takes_the_slot_of_the_smallest() -> None:
    """OpenSAE's way: a token keeps its k entries; what was set before can be the smallest itself."""
    indices, values = torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.tensor([[0.5, 3.0, 1.0], [2.0, 0.1, 0.2]])
    codes = Codes.from_topk(indices, values, 6)
    span = Span(0, 2, 2)
    found = apply_all(codes, [Set(latent=3, value=9.0, evict=True)], 1, span)
    found.check()
    assert found.uniform_k == 3
    assert found.topk_view()[0].tolist() == [[2, 3, 5], [1, 3, 4]]
    torch.testing.assert_close(found.topk_view()[1], torch.tensor([[3.0, 9.0, 1.0], [2.0, 9.0, 0.2]]))
    twice = apply_all(codes, [Set(latent=[3, 0], value=[0.0, 7.0], evict=True)], 1, span)
    assert twice.topk_view()[0].tolist() == [[0, 2, 5], [0, 1, 4]]
    added = apply_all(codes, [Add(latent=1, value=0.25, where=[0], evict=True)], 1, span)
    assert added.topk_view()[0].tolist() == [[1, 2, 5], [1, 3, 4]]
    empty = Codes.from_dense(torch.zeros(2, 6))
    assert apply_all(empty, [Set(latent=3, value=9.0, evict=True)], 1, span).dense()[:, 3].tolist() == [9.0, 9.0]


def test_where_another_latent_fires() -> None:
    dense = torch.tensor([[[0.0, 2.0], [1.0, 0.5], [3.0, 0.0], [0.0, 4.0]]])
    codes = Codes.from_dense(dense)
    span = Span(0, 4, 2)

    def hit(where: Fires) -> list[bool]:
        return (apply_all(codes, [Set(latent=0, value=9.0, where=where)], 1, span).dense()[0, :, 0] == 9.0).tolist()

    assert hit(Fires(latent=1)) == [True, True, False, True]
    assert hit(Fires(latent=1, above=1.0)) == [True, False, False, True]
    assert hit(Fires(latent=1, within="generated")) == [False, False, False, True]
    assert hit(Fires(latent=1, within=[1, 2])) == [False, True, False, False]
    assert hit(Fires(latent=1, above=-1.0)) == [True, True, True, True]
    # As the interventions before left it.
    acts = [Ablate(latent=1), Set(latent=0, value=9.0, where=Fires(latent=1))]
    assert not (apply_all(codes, acts, 1, span).dense()[..., 0] == 9.0).any()


def test_left_padding_shifts_places() -> None:
    codes = Codes.from_dense(torch.ones(2, 4, 1))
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    span = Span(0, 4, 4, torch.tensor([2, 0]), valid)
    assert apply_all(codes, [Ablate(latent=0)], 2, span).dense()[..., 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert apply_all(codes, [Ablate(latent=0, where=[0])], 2, span).dense()[..., 0].tolist() == [
        [1, 1, 0, 1], [0, 1, 1, 1],
    ]  # fmt: skip


def test_means_and_quantiles_come_from_the_distribution() -> None:
    codes = Codes.from_dense(torch.tensor([[1.0, 0.0, 5.0]]))
    known = LatentDistribution({0: [1.0, 2.0, 3.0], 1: [4.0], 2: []}, positions=10)
    facts = LatentFacts("a", 3, {"mean_activation": torch.tensor([0.1, 0.2, 0.3])}, known)
    span = Span(0, 1, 1)

    def done(*acts: Any, facts: LatentFacts = facts) -> list[float]:
        return apply_all(codes, list(acts), 1, span, facts).dense()[0].tolist()

    assert done(Ablate(latent=[0, 1, 2], to="mean")) == pytest.approx([0.6, 0.4, 0.0])
    bare = LatentFacts("a", 3, facts.statistics)
    assert done(Ablate(latent=[0, 1, 2], to="mean"), facts=bare) == pytest.approx([0.1, 0.2, 0.3])
    assert done(Set(latent=[0, 1], value=[0.5, 2.0], units="quantile")) == pytest.approx([2.0, 8.0, 5.0])
    assert done(Add(latent=0, value=-1.0, units="quantile")) == pytest.approx([-2.0, 0.0, 5.0])
    assert done(Clamp(latent=0, minimum=1.0, units="quantile")) == pytest.approx([3.0, 0.0, 5.0])
    for act, facts_, says in [
        (Ablate(latent=0, to="mean"), LatentFacts("a", 3), "has no statistic 'mean_activation' and no distribution"),
        (Set(latent=0, value=0.5, units="quantile"), bare, "needs the distribution of coder 'a'"),
        (Set(latent=2, value=0.5, units="quantile"), facts, "latent 2 never fired on the text"),
    ]:
        with pytest.raises(ConfigError, match=says):
            done(act, facts=facts_)


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
        (lambda: Ablate(latent=[]), "Ablate names no latent"),
        (lambda: Ablate(latent=[3, 4, 3]), "Ablate names a latent twice: 3"),
        (lambda: Set(latent=[3, 4], value=[1.0]), "Set has 1 numbers in value for 2 latents"),
        (lambda: Add(latent=3, value=float("nan")), "Add: value is nan, which is not finite"),
        (lambda: Clamp(latent=[1, 2], minimum=[0.0, 2.0], maximum=1.0), "minimum 2.0 is above maximum 1.0"),
        (lambda: Ablate(latent=1).scaled(2.0), "Ablate has no strength to scale"),
        (lambda: checked_range("later"), "where is 'later'; allowed: all, prompt, generated, or a list"),
        (lambda: Set(latent=0, value=1.0, where=[3, -1]), "where holds -1; positions count from 0"),
    ],
)
def test_interventions_are_checked_when_made(build: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build()  # type: ignore[operator]


def test_latents_of_numpy_and_tensors_are_whole_numbers() -> None:
    assert Set(latent=np.int64(3), value=1.0) == Set(latent=torch.tensor(3), value=1.0) == Set(latent=3, value=1.0)
    assert Ablate(latent=np.array([3, 5])) == Ablate(latent=torch.tensor([3, 5])) == Ablate(latent=(3, 5))
    assert type(Ablate(latent=np.int64(3)).latent) is int
    with pytest.raises(ConfigError, match=r"latent is array\(\[3.7\]\); expected a whole number, or several"):
        Ablate(latent=np.array([3.7]))


def test_no_text_to_measure_on() -> None:
    with pytest.raises(DataError, match="no text to measure latents on"):
        measure_latents(tiny("llama"), topk_coder("layers.1", 16), [], [1])
