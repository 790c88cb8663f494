"""Steering vectors against hand-written edits; at chosen places, with coders and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unmix
from lm.fakes import LinearCoder, topk_coder
from lm.families import some_tokens, tiny
from unmix.core.errors import ConfigError, ModelError
from unmix.core.policy import InputPolicy

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
VECTOR = torch.randn(16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "granite"])
@pytest.mark.parametrize("point", ["resid_pre", "resid_mid", "mlp_out_post", "attn_out", "z", "mlp_in"])
def test_a_vector_on_any_hook_without_a_coder(family: str, point: str) -> None:
    lm, tokens, hook = tiny(family), some_tokens(), f"blocks.1.{point}"
    vector = torch.randn(lm.width(hook), generator=torch.Generator().manual_seed(3))
    places = torch.tensor([False, False, True, True, False, False, False, False, True])

    def edit(x: torch.Tensor) -> torch.Tensor:
        return torch.where(places.unsqueeze(-1), x + 2.0 * vector, x)

    expected = lm.spliced_logits(tokens, {hook: edit})
    act = unmix.Steer(vector, 2.0, hook=hook, where=[2, 3, 8])
    with lm.bind(interventions=[act]) as bound, torch.no_grad():
        torch.testing.assert_close(bound(tokens).logits, expected, **CLOSE)
        assert torch.equal(bound(tokens).logits[:, :2], lm.logits(tokens)[:, :2])
    assert not torch.allclose(expected, lm.logits(tokens), atol=1e-2)


def test_along_a_latents_direction_where_its_coder_writes() -> None:
    lm, tokens, hook = tiny("llama"), some_tokens(), "blocks.1.resid_post"
    coder = topk_coder(hook, 16, input_policy=InputPolicy(bos="none", skip_first=1))
    with torch.no_grad():
        coder.W_dec.mul_(3.0)
    with lm.bind(coder, error="keep") as bound, torch.no_grad():
        plain = bound(tokens, capture=[hook]).activations[hook]
        act = unmix.Steer(latent=5, scale=4.0, where="all")
        moved = bound(tokens, capture=[hook], interventions=[act]).activations[hook] - plain
    torch.testing.assert_close(moved[:, 1:], (4.0 * coder.dictionary[5]).expand(2, 8, 16), **CLOSE)
    assert (moved[:, 0] == 0).all()  # the coder leaves the first position alone


def test_a_direction_over_several_writes_is_cut_like_the_output() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    hooks = ("blocks.1.mlp_out", "blocks.2.mlp_out")
    config = topk_coder("x", 16).config.model_copy(
        update={"reads": ("blocks.1.mlp_in",), "writes": hooks, "d_out": 32, "pre_bias": "none"}
    )
    coder = unmix.SparseCoder(config, seed=2)
    with lm.bind(coder, error="keep") as bound, torch.no_grad():
        plain = bound(tokens, capture=hooks).activations
        moved = bound(tokens, capture=hooks, interventions=[unmix.Steer(latent=3, where=[4])]).activations
    whole = coder.dictionary[3]
    torch.testing.assert_close((moved[hooks[0]] - plain[hooks[0]])[:, 4], whole[:16].expand(2, 16), **CLOSE)


def test_vectors_come_after_the_coders_that_write_there() -> None:
    lm, tokens, hook = tiny("llama"), some_tokens(), "blocks.1.resid_post"
    coder = LinearCoder(hook, 16)
    with lm.bind(coder) as bound, torch.no_grad():
        x = bound(tokens, capture=[hook]).activations[hook]
        moved = bound(tokens, capture=[hook], interventions=[unmix.Steer(VECTOR, hook=hook)]).activations[hook]
    torch.testing.assert_close(moved, x + VECTOR, **CLOSE)


def test_where_a_latent_fires() -> None:
    lm, tokens, hook = tiny("llama"), some_tokens(), "blocks.2.resid_post"
    coder = topk_coder("layers.1", 16, input_policy=InputPolicy(bos="none", skip_first=1))
    with lm.bind(coder, error="keep") as bound, torch.no_grad():
        out = bound(tokens, capture=[hook])
        firing = out.codes["layers.1"].dense() > 0
        latent = int((firing[:, 0].any(0) & firing[:, 1:].any(1).any(0)).nonzero()[0])
        act = unmix.Steer(VECTOR, hook=hook, where=unmix.Fires(latent=latent))
        moved = bound(tokens, capture=[hook], interventions=[act]).activations[hook]
        fires = out.codes["layers.1"].dense()[..., latent] > 0
    fires[:, 0] = False  # masked for the coder
    assert fires.any() and not fires.all()
    torch.testing.assert_close(moved[fires], out.activations[hook][fires] + VECTOR, **CLOSE)
    assert torch.equal(moved[~fires], out.activations[hook][~fires])


def test_conditions_see_another_coder_after_its_interventions() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    coders = {"a": topk_coder("layers.0", 16), "b": topk_coder("layers.1", 16)}
    with lm.bind(coders, error="keep") as bound, torch.no_grad():
        acts = [
            unmix.Set(latent=2, value=5.0, coder="a", where=[3]),
            unmix.Set(latent=9, value=7.0, coder="b", where=unmix.Fires(latent=2, coder="a", above=4.9)),
        ]
        codes = bound(tokens, interventions=acts).codes["b"].dense()[..., 9]
        assert (codes == 7.0).tolist() == [[i == 3 for i in range(9)]] * 2
        late = unmix.Set(latent=2, value=5.0, coder="a", where=unmix.Fires(latent=9, coder="b"))
        with pytest.raises(
            ModelError, match=r"coder 'b' runs after blocks.0.resid_post, so what fires in it comes late"
        ):
            bound(tokens, interventions=[late])
        with pytest.raises(ModelError, match="no coder 'c' is bound"):
            bound(tokens, interventions=[unmix.Ablate(latent=1, coder="a", where=unmix.Fires(latent=1, coder="c"))])
        with pytest.raises(ModelError, match="coder 'b' has latents 0 to 23"):
            bound(tokens, interventions=[unmix.Ablate(latent=1, coder="b", where=unmix.Fires(latent=24))])


def test_gradients_reach_the_vector() -> None:
    lm, tokens, hook = tiny("llama"), some_tokens(1, 5), "blocks.1.resid_post"
    vector = VECTOR.clone().requires_grad_()
    with lm.bind(interventions=[unmix.Steer(vector, 3.0, hook=hook)]) as bound:
        (found,) = torch.autograd.grad(bound(tokens).logits.logsumexp(-1).sum(), [vector])
    same = VECTOR.clone().requires_grad_()
    out = lm.run(tokens, {hook: lambda x: x + 3.0 * same}).logits
    (expected,) = torch.autograd.grad(out.logsumexp(-1).sum(), [same])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_generation_is_steered_from_its_first_token_on() -> None:
    lm, tokens, hook = tiny("llama"), some_tokens(1, 5), "blocks.1.resid_post"
    act = unmix.Steer(VECTOR, 20.0, hook=hook, where="generated")
    with lm.bind(interventions=[act]) as bound, torch.no_grad():
        found = bound.generate_tokens(tokens, 5, stop_ids=())
        context = tokens
        for _ in range(5):
            out = bound(context, prompt=5)
            context = torch.cat([context, out.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, context[:, 5:])
    with lm.bind(LinearCoder(hook, 16), error="keep") as bare:
        assert not torch.equal(found, bare.generate_tokens(tokens, 5, stop_ids=()))


@pytest.mark.parametrize(
    "act",
    [
        unmix.Steer(latent=3, scale=30.0),
        unmix.Steer(VECTOR, 30.0, hook="blocks.1.resid_post", where=unmix.Fires(latent=3, above=-1.0)),
    ],
    ids=["along a latent", "where a latent fires"],
)
def test_with_a_coder_on_the_prompt_alone_a_cache_changes_nothing(act: unmix.Steer) -> None:
    """What hangs on a coder ends where the coder does, also in steps that the coder has no part in."""
    lm, tokens = tiny("llama"), some_tokens(1, 5)
    with lm.bind(topk_coder("layers.1", 16), where="prompt", error="keep") as bound, torch.no_grad():
        found = bound.generate_tokens(tokens, 6, interventions=[act], stop_ids=())
        plain = bound.generate_tokens(tokens, 6, stop_ids=())
        context = tokens
        for _ in range(6):
            out = bound(context, prompt=5, interventions=[act])
            context = torch.cat([context, out.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, context[:, 5:]) and not torch.equal(found, plain)


def test_a_condition_on_a_direction_is_of_the_same_coder() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    with lm.bind({"a": topk_coder("layers.0", 16), "b": topk_coder("layers.1", 16)}) as bound:
        plans = [
            bound.plan([unmix.Steer(latent=3, coder="b", where=unmix.Fires(latent=2, coder=name))])
            for name in (None, "b")
        ]
        assert plans[0].pushes[0].where == plans[1].pushes[0].where
        bound(tokens, interventions=[unmix.Steer(latent=3, coder="b", where=unmix.Fires(latent=2))])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (unmix.Steer, "Steer needs a vector with its hook, or a latent"),
        (lambda: unmix.Steer([1.0], latent=3, hook="x"), "one of the two"),
        (lambda: unmix.Steer([1.0]), "say at which hook the vector is added"),
        (lambda: unmix.Steer(latent=3, hook="x"), "a latent is steered where its coder writes"),
        (lambda: unmix.Steer(torch.ones(2, 3), hook="x"), r"a vector is \[d\] of floating point"),
        (lambda: unmix.Steer([float("inf")], hook="x"), "the vector is not finite"),
        (lambda: unmix.Steer(latent=-3), "latents count from 0"),
    ],
)
def test_vectors_are_checked_when_made(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (unmix.Steer(VECTOR[:8], hook="layers.1"), "blocks.1.resid_post of tiny-llama is 16 wide"),
        (unmix.Steer(VECTOR, hook="layers.9"), "there is no layer 9"),
        (unmix.Steer(latent=24), "has latents 0 to 23"),
        (unmix.Steer(latent=2, coder="other"), "no coder 'other' is bound"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_before_any_pass(act: unmix.Steer, says: str) -> None:
    with pytest.raises(ModelError, match=says), tiny("llama").bind(topk_coder("layers.0", 16), interventions=[act]):
        pass


def test_a_latents_direction_needs_its_coder() -> None:
    with (
        pytest.raises(ModelError, match="no coder is bound"),
        tiny("llama").bind(interventions=[unmix.Steer(latent=2)]),
    ):
        pass
