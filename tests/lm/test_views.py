"""Views: the folded and centred tensors, read and written, against the maths on the model's own weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmix.core.errors import ModelError
from unmix.lm import LanguageModel
from unmix.lm.points import STREAM_POINTS

from .fakes import LinearCoder
from .families import CONFIGS, PARALLEL, raw_model, some_tokens, tiny

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FAMILIES = list(CONFIGS)
# OLMo 2 norms only after its sublayers, OPT-350m after the additions.
PRE_NORM = [f for f in FAMILIES if f not in ("olmo2", "opt_350m")]
SANDWICH = ("gemma2", "gemma3", "olmo2")
LAYER_NORM = ("gpt2", "gpt_neox_sequential", "opt")


def spread(x: Tensor, lm: LanguageModel, path: str) -> Tensor:
    """x over its spread, with the norm's own eps: with the mean taken off where the norm has a bias."""
    norm = lm.model.get_submodule(path)
    eps = next((float(getattr(norm, name)) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5)
    centre = "LayerNorm" in type(norm).__name__
    x = x - x.mean(dim=-1, keepdim=True) if centre else x
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("point", ["attn_in", "mlp_in", "final_norm"])
def test_normalised_is_the_norm_without_gain_and_bias(family: str, point: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    name = point if point == "final_norm" else f"blocks.1.{point}"
    seen = lm.hook(f"{name}~normalised")
    source = {
        "final_norm": "blocks.2.resid_post",
        "attn_in": "blocks.1.resid_pre",
        "mlp_in": "blocks.1.resid_pre" if family in PARALLEL else "blocks.1.resid_mid",
    }[point]
    acts = lm.capture(tokens, [seen.name, name, source])
    torch.testing.assert_close(acts[seen.name], spread(acts[source], lm, seen.read.path), **CLOSE)
    norm = lm.model.get_submodule(seen.read.path)
    torch.testing.assert_close(norm(acts[source]), acts[name], **CLOSE)
    assert seen.view is not None
    torch.testing.assert_close(seen.view.undo(acts[seen.name], acts[name]), acts[name], **CLOSE)
    assert not torch.allclose(acts[seen.name], acts[name], atol=1e-2) or not list(norm.parameters())


@pytest.mark.parametrize("family", SANDWICH)
def test_normalised_contributions(family: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    for point, raw in (("attn_out_post", "attn_out"), ("mlp_out_post", "mlp_out")):
        seen = lm.hook(f"blocks.1.{point}~normalised")
        acts = lm.capture(tokens, [seen.name, f"blocks.1.{raw}"])
        torch.testing.assert_close(acts[seen.name], spread(acts[f"blocks.1.{raw}"], lm, seen.read.path), **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma2", "llama", "gpt_neox", "phi", "opt"])
@pytest.mark.parametrize("point", ["attn_in~normalised", "mlp_in~normalised"])
def test_a_normalised_view_is_written_at_its_point_alone(family: str, point: str) -> None:
    lm, tokens = tiny(family), some_tokens()
    name = f"blocks.1.{point}"
    view, base = lm.hook(name).view, name.partition("~")[0]
    assert view is not None
    new = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    found = lm.run(tokens, {name: lambda _: new}, capture=[base, "blocks.1.resid_pre"])
    expected = lm.spliced_logits(tokens, {base: lambda x: view.undo(new, x)})
    torch.testing.assert_close(found.logits, expected, **CLOSE)
    torch.testing.assert_close(found.activations[base], view.undo(new, new), **CLOSE)
    bare = lm.capture(tokens, "blocks.1.resid_pre")["blocks.1.resid_pre"]
    assert torch.equal(found.activations["blocks.1.resid_pre"], bare)


@pytest.mark.parametrize("point", STREAM_POINTS)
def test_centred_takes_the_mean_off_and_puts_it_back(point: str) -> None:
    lm, tokens = tiny("gpt2"), some_tokens()
    name = point if point == "embeddings" else f"blocks.1.{point}"
    acts = lm.capture(tokens, [name, f"{name}~centred"])
    raw, seen = acts[name], acts[f"{name}~centred"]
    torch.testing.assert_close(seen, raw - raw.mean(dim=-1, keepdim=True))
    new = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    out = lm.run(tokens, {f"{name}~centred": lambda _: new}, capture=[name])
    torch.testing.assert_close(out.activations[name], new + raw.mean(dim=-1, keepdim=True), **CLOSE)
    same = lm.run(tokens, {f"{name}~centred": lambda y: y + 0.0}).logits
    torch.testing.assert_close(same, lm.logits(tokens), **CLOSE)


@pytest.mark.parametrize("family", LAYER_NORM)
def test_a_layer_norm_model_does_not_see_the_mean_that_is_put_back(family: str) -> None:
    """So writing x̂ to the view gives what the centred model computes with x̂."""
    lm, tokens = tiny(family), some_tokens()
    new = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    through = lm.spliced_logits(tokens, {"blocks.1.resid_post~centred": lambda _: new})
    bare = lm.spliced_logits(tokens, {"blocks.1.resid_post": lambda _: new})
    torch.testing.assert_close(through, bare, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi", "qwen2"])
def test_unbiased_heads(family: str) -> None:
    """With no value bias and no bias of the norm before, z is what the view shows."""
    lm, tokens = tiny(family), some_tokens()
    seen = lm.capture(tokens, "blocks.0.z~unbiased")["blocks.0.z~unbiased"]
    raw = lm.capture(tokens, "blocks.0.z")["blocks.0.z"]
    difference = raw - seen
    torch.testing.assert_close(difference, difference[:1, :1].expand_as(raw), **CLOSE)
    assert float(difference.abs().max()) > 1e-2
    # The first position attends to itself alone: its z is its value, whose constant part is what the view takes off.
    normed = lm.capture(tokens, ["blocks.0.attn_in~normalised", "blocks.0.attn_in"])
    zero = torch.zeros_like(normed["blocks.0.attn_in"])
    flat = lm.run(tokens, {"blocks.0.attn_in~normalised": lambda _: zero}, capture=["blocks.0.z"])
    torch.testing.assert_close(flat.activations["blocks.0.z"], difference, **CLOSE)
    torch.testing.assert_close(
        lm.run(tokens, {"blocks.0.z~unbiased": lambda y: y + 0}).logits, lm.logits(tokens), **CLOSE
    )


def test_z_without_value_biases_is_unbiased_already() -> None:
    acts = tiny("llama").capture(some_tokens(), ["blocks.1.z", "blocks.1.z~unbiased"])
    assert torch.equal(acts["blocks.1.z"], acts["blocks.1.z~unbiased"])


def test_gradients_flow_through_a_view() -> None:
    lm, tokens = tiny("gemma2"), some_tokens()
    coder = LinearCoder("blocks.1.mlp_in~normalised", 16, "blocks.1.mlp_out_post")
    with lm.bind(coder) as bound:
        bound(tokens).logits.logsumexp(-1).sum().backward()
    assert coder.W.grad is not None and float(coder.W.grad.norm()) > 0
    seen = lm.capture(tokens, "blocks.1.ln2.hook_normalized")["blocks.1.ln2.hook_normalized"]
    expected = lm.spliced_logits(tokens, {"blocks.1.mlp_out_post": lambda _: coder.map(seen)})
    with lm.bind(coder) as bound, torch.no_grad():
        torch.testing.assert_close(bound(tokens).logits, expected, **CLOSE)


def test_a_view_leaves_the_norm_and_other_passes_alone() -> None:
    lm, tokens = LanguageModel(raw_model("gpt2"), "fresh"), some_tokens()
    before = lm.logits(tokens)
    calls: list[int] = []
    norm = lm.model.transformer.h[1].ln_2
    norm.register_forward_hook(lambda *_: calls.append(1))
    names = [name for name, _ in lm.model.named_parameters()]
    lm.capture(tokens, ["blocks.1.mlp_in~normalised", "blocks.1.mlp_in"])
    assert len(calls) == 1  # the copy without a gain carries no hooks
    assert [name for name, _ in lm.model.named_parameters()] == names
    assert torch.equal(lm.logits(tokens), before)


def test_a_changed_gain_is_the_one_that_is_written() -> None:
    lm, tokens = LanguageModel(raw_model("llama").requires_grad_(False), "fresh"), some_tokens()
    hook = "blocks.1.mlp_in~normalised"
    first = lm.spliced_logits(tokens, {hook: torch.ones_like})
    seen = lm.capture(tokens, hook)[hook]
    lm.model.model.layers[1].post_attention_layernorm.weight.mul_(2)
    assert torch.equal(lm.capture(tokens, hook)[hook], seen)
    assert not torch.allclose(lm.spliced_logits(tokens, {hook: torch.ones_like}), first, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "spec", "says"),
    [
        ("llama", "blocks.1.resid_pre~centered", r"no view 'centered'\. Did you mean 'centred'\?"),
        (
            "llama",
            "blocks.1.mlp_in~centred",
            "only the stream and what is added to it are centred: embeddings, resid_pre",
        ),
        (
            "llama",
            "blocks.1.resid_pre~normalised",
            "only what comes out of a norm has a normalised view: attn_in, mlp_in",
        ),
        ("llama", "blocks.1.mlp_out_post~normalised", "no norm of LlamaForCausalLM's block gives this"),
        ("olmo2", "blocks.1.mlp_in~normalised", "no norm of Olmo2ForCausalLM's block gives this"),
        ("opt_350m", "blocks.1.attn_in~normalised", "no norm of OPTForCausalLM's block gives this"),
        ("llama", "blocks.1.mlp_in~unbiased", "mlp_in has no such view; unbiased is one of z"),
        ("gpt2", "blocks.1.z~unbiased#1", "a view has no heads; take the columns of the whole"),
        ("llama", "model.layers.1.self_attn.q_proj~centred", "only the stream and what is added to it"),
    ],
)
def test_views_that_do_not_exist(family: str, spec: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        tiny(family).hook(spec)
