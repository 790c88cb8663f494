"""Steering to a target KL: it converges for every kind and target, and says when it cannot."""

from __future__ import annotations

import math

import pytest
import torch

import unmix
from lm.fakes import topk_coder
from lm.families import some_tokens, tiny
from unmix.core.errors import ConfigError, ModelError
from unmix.lm.interventions.target_kl import _Search

VECTOR = torch.randn(16, generator=torch.Generator().manual_seed(3))
HOOK = "blocks.1.resid_post"


def mean_kl(clean: torch.Tensor, moved: torch.Tensor) -> float:
    """KL(clean ‖ moved) by torch's own function."""
    p, q = clean.double().log_softmax(-1), moved.double().log_softmax(-1)
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("target", [1e-3, 0.1])
@pytest.mark.parametrize(
    "act",
    [
        unmix.Steer(VECTOR, hook=HOOK),
        unmix.Steer(latent=3, scale=5.0),
        unmix.Add(latent=[3, 4], value=[1.0, -2.0]),
        unmix.Multiply(latent=list(range(24)), factor=1.5),
    ],
    ids=["vector", "direction", "add", "multiply"],
)
def test_the_strength_found_has_the_target_kl(act: unmix.Steer | unmix.Add, target: float) -> None:
    lm, tokens = tiny("llama"), some_tokens(2, 8)
    with lm.bind(topk_coder("layers.1", 16), error="keep") as bound, torch.no_grad():
        found = bound.steer_to_kl(tokens, [act], target, tolerance=1e-4)
        moved = bound(tokens, interventions=found.interventions).logits
        assert mean_kl(bound(tokens).logits, moved) == pytest.approx(target, rel=1e-3)
    assert found.kl == pytest.approx(target, rel=1e-4)
    assert found.interventions == (act.scaled(found.strength),)
    assert (found.strength, found.kl) in found.tried and len(found.tried) < 40


def test_over_generated_positions_of_a_text_that_stays_the_same() -> None:
    lm, tokens = tiny("llama"), some_tokens(1, 6)
    act = unmix.Steer(VECTOR, hook=HOOK, where="generated")
    with lm.bind(interventions=[act.scaled(0.0)]) as bound, torch.no_grad():
        found = bound.steer_to_kl(tokens, [act], 0.2, over="generated", new_tokens=9, tolerance=0.001)
        text = torch.cat([tokens, bound.generate_tokens(tokens, 9, stop_ids=())], dim=1)
        moved = bound(text, interventions=found.interventions, prompt=6).logits
        assert mean_kl(lm.logits(text)[:, 6:], moved[:, 6:]) == pytest.approx(0.2, rel=0.002)
        assert torch.equal(moved[:, :6], lm.logits(text)[:, :6])


def test_the_bindings_own_interventions_belong_to_what_is_compared_with() -> None:
    lm, tokens = tiny("llama"), some_tokens(1, 6)
    own = unmix.Set(latent=2, value=9.0)
    with lm.bind(topk_coder("layers.1", 16), interventions=[own]) as bound, torch.no_grad():
        found = bound.steer_to_kl(tokens, [unmix.Add(latent=3, value=1.0)], 0.2)
        moved = bound(tokens, interventions=found.interventions).logits
        assert mean_kl(bound(tokens).logits, moved) == pytest.approx(0.2, rel=0.012)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_the_search_converges_on_any_growing_curve(power: float, scale: float) -> None:
    search = _Search(lambda s: (s / scale) ** power, 0.37, 1e-6, 80)
    strength, kl = search.run()
    assert kl == pytest.approx(0.37, rel=1e-6)
    assert strength == pytest.approx(scale * 0.37 ** (1 / power), rel=1e-4)
    assert len(search.tried) < 60


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(ModelError, match="no strength reaches a KL of 2: the largest found is 1"):
        _Search(lambda s: 1 - math.exp(-s), 2.0, 0.01, 60).run()
    with pytest.raises(ModelError, match=r"above the target 0.5 at strength 0 already"):
        _Search(lambda s: 1 + s, 0.5, 0.01, 60).run()
    with pytest.raises(ModelError, match=r"10 measurements did not find a KL of 0.5; nearest: 0 at"):
        _Search(lambda s: 0.0 if s < 0.7 else 9.0, 0.5, 0.01, 10).run()


def test_interventions_that_move_nothing_are_told_early() -> None:
    search = _Search(lambda s: 0.0, 0.5, 0.01, 60)
    with pytest.raises(ModelError, match="still change nothing at the positions measured"):
        search.run()
    assert len(search.tried) < 20
    with tiny("llama").bind(topk_coder("layers.1", 16), error="keep") as bound:
        for where in ("generated", unmix.Fires(latent=1, within="generated")):
            act = unmix.Set(latent=3, value=2.0, where=where)
            with pytest.raises(ConfigError, match='say over="generated"'):
                bound.steer_to_kl(some_tokens(), [act], 0.1)


def test_options_are_checked() -> None:
    with tiny("llama").bind(topk_coder("layers.1", 16)) as bound:
        for acts, options, says in [
            ([unmix.Ablate(latent=3)], {}, "Ablate has no strength to scale"),
            ([], {}, "no intervention to scale"),
            ([unmix.Add(latent=3, value=1.0)], {"target": 0.0}, "target must be above 0"),
            ([unmix.Add(latent=3, value=1.0)], {"over": "generated", "new_tokens": 0}, "no position to measure"),
        ]:
            with pytest.raises(ConfigError, match=says):
                bound.steer_to_kl(some_tokens(), acts, **{"target": 0.1, **options})
        with pytest.raises(ModelError, match="has latents 0 to 23"):
            bound.steer_to_kl(some_tokens(), [unmix.Add(latent=30, value=1.0)], 0.1)
