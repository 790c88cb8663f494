"""Coders whose writes add up, bound as one: against the set's own decode and a hand-written splice."""

from __future__ import annotations

import pytest
import torch

import unmix
from unmix.coder.config import CoderConfig, TopK
from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel

from .fakes import EVERYWHERE, LinearCoder, topk_coder
from .families import raw_model, some_tokens, tiny

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def cross_layer(n_layers: int = 3, policy: InputPolicy = EVERYWHERE, latents: int = 20) -> unmix.CoderSet:
    """A cross-layer transcoder: layer i reads its MLP's input and writes the MLPs from i on."""
    coders = {
        f"layer{i}": unmix.SparseCoder(
            CoderConfig(
                name=f"layer{i}", reads=(f"blocks.{i}.mlp_in",), d_in=16, d_out=16 * (n_layers - i),
                writes=tuple(f"blocks.{j}.mlp_out" for j in range(i, n_layers)), n_latents=latents,
                activation=TopK(k=4), pre_bias="none", input_policy=policy,
            ),
            seed=i,
        )
        for i in range(n_layers)
    }  # fmt: skip
    return unmix.CoderSet(coders)


def test_a_cross_layer_transcoder_writes_sums() -> None:
    """Each hook is the sum of what the set writes there, given what its members read in the spliced pass."""
    lm, tokens, coders = tiny("llama"), some_tokens(), cross_layer()
    hooks = [f"blocks.{i}.{point}" for i in range(3) for point in ("mlp_in", "mlp_out")]
    with lm.bind(coders) as bound, torch.no_grad():
        out = bound(tokens, capture=hooks)
        expected = coders.decode(coders.encode({h: out.activations[h] for h in hooks if h.endswith("in")}))
        for hook, value in expected.items():
            torch.testing.assert_close(out.activations[hook], value, **CLOSE)
    assert list(out.codes) == ["layer0", "layer1", "layer2"]
    assert not torch.allclose(out.logits, lm.logits(tokens), atol=1e-2)


def test_kept_errors_and_interventions_on_a_member() -> None:
    lm, tokens, coders = tiny("gpt2"), some_tokens(), cross_layer()
    hooks = ["blocks.1.mlp_out", "blocks.2.mlp_out"]
    with lm.bind(coders, error="keep") as bound, torch.no_grad():
        plain = bound(tokens, capture=hooks)
        assert torch.equal(plain.logits, lm.logits(tokens))
        act = unmix.Add(latent=7, value=3.0, coder="layer1", where=[4])
        moved = bound(tokens, capture=hooks, interventions=[act])
    row = coders["layer1"].W_dec[7].detach()
    difference = moved.activations[hooks[0]] - plain.activations[hooks[0]]
    torch.testing.assert_close(difference[:, 4], (3.0 * row[:16]).expand(2, 16), **CLOSE)
    assert (difference[:, :4] == 0).all()
    assert not torch.equal(moved.activations[hooks[1]][:, 4], plain.activations[hooks[1]][:, 4])


def test_gradients_reach_every_member() -> None:
    lm, tokens, coders = tiny("llama"), some_tokens(), cross_layer()
    for error in ("drop", "keep"):
        with lm.bind(coders, error=error) as bound:
            out = bound(tokens)
        values = [out.codes[name].values for name in coders]
        found = torch.autograd.grad(out.logits.logsumexp(-1).sum(), values)
        assert all(float(gradient.norm()) > 0 for gradient in found)


def test_a_set_beside_other_coders_and_under_a_name() -> None:
    lm, tokens, coders = tiny("llama"), some_tokens(), cross_layer()
    with lm.bind({"clt": coders, "res": LinearCoder("layers.0", 16)}) as bound, torch.no_grad():
        assert list(bound(tokens).codes) == ["clt/layer0", "clt/layer1", "clt/layer2", "res"]
    with lm.bind([coders, LinearCoder("layers.0", 16, name="res")]) as bound, torch.no_grad():
        assert list(bound(tokens).codes) == ["layer0", "layer1", "layer2", "res"]
    with (
        pytest.raises(ModelError, match=r"coders 'layer0' and 'other' both write blocks.0.mlp_out"),
        lm.bind([coders, LinearCoder("blocks.0.mlp_out", 16, name="other")]),
    ):
        pass
    with (
        pytest.raises(ModelError, match=r"coders 'a/layer0' and 'b/layer0' both write blocks.0.mlp_out"),
        lm.bind({"a": coders, "b": cross_layer()}),
    ):
        pass


def test_what_a_set_masks_passes_by() -> None:
    lm, tokens = tiny("llama"), some_tokens()
    coders = cross_layer(policy=InputPolicy(bos="none", skip_first=2))
    bare = lm.capture(tokens, "blocks.0.mlp_out")["blocks.0.mlp_out"]
    with lm.bind(coders) as bound, torch.no_grad():
        found = bound(tokens, capture=["blocks.0.mlp_out"]).activations["blocks.0.mlp_out"]
    assert torch.equal(found[:, :2], bare[:, :2]) and not torch.allclose(found[:, 2:], bare[:, 2:], atol=1e-3)
    mixed = unmix.CoderSet({**cross_layer(), "late": topk_coder("blocks.2.mlp_out", 16, input_policy=InputPolicy())})
    with pytest.raises(ModelError, match="all must have the same input policy"), lm.bind(mixed):
        pass


def test_a_sum_of_coders_on_one_hook() -> None:
    """Two autoencoders that read and write the same stream, as one."""
    lm, tokens = tiny("llama"), some_tokens()
    one, two = topk_coder("layers.1", 16, name="a"), topk_coder("layers.1", 16, name="b", k=7)
    expected = lm.spliced_logits(
        tokens, {"layers.1": lambda x: one(x).reconstruction.detach() + two(x).reconstruction.detach()}
    )
    with lm.bind(unmix.CoderSet({"a": one, "b": two})) as bound, torch.no_grad():
        torch.testing.assert_close(bound(tokens).logits, expected, **CLOSE)


def test_generation_with_a_cache_equals_full_reruns() -> None:
    lm, tokens, coders = tiny("llama"), some_tokens(2, 5), cross_layer()
    acts = [unmix.Set(latent=3, value=6.0, coder="layer0", where="generated")]
    with lm.bind(coders, interventions=acts) as bound, torch.no_grad():
        found = bound.generate_tokens(tokens, 6, stop_ids=())
        context = tokens
        for _ in range(6):
            context = torch.cat([context, bound(context, prompt=5).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, context[:, 5:])


def test_a_saved_set_binds_as_one(tmp_path: object) -> None:
    cross_layer().save(f"{tmp_path}/clt")
    lm, tokens = LanguageModel(raw_model("llama").requires_grad_(False), "m"), some_tokens()
    with lm.bind(unmix.load_all(f"{tmp_path}/clt")) as bound, lm.bind(cross_layer()) as fresh, torch.no_grad():
        assert torch.equal(bound(tokens).logits, fresh(tokens).logits)
