"""Temporal coders: a plain loop over tokens, what is predicted from what, sequences apart. The peer's: tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.coder.config import CoderConfig, Temporal
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError

D, F = 5, 16


def make(seed: int = 0, **rule: Any) -> SparseCoder:
    fields = {key: rule.pop(key) for key in ("pre_bias", "gate_space", "d_out", "normalise") if key in rule}
    rule = {"n_heads": 2, "n_layers": 2, "bottleneck": 2, "z_scale": 0.5} | rule
    coder = SparseCoder(CoderConfig(d_in=D, n_latents=F, activation=Temporal(**rule), **fields)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return coder


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2


@torch.no_grad()
def plain(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense codes and output of one sequence [tokens, d], by the formulas, token by token."""
    rule: Any = coder.config.activation
    extra = coder.extra()
    heads, r = rule.n_heads, x - coder.b_dec
    predicted = torch.zeros_like(r)
    for layer in range(rule.n_layers):
        z = (r * rule.z_scale @ coder.W_enc.T + coder.b_enc).relu()
        guesses = torch.zeros_like(r)
        for t in range(len(r)):
            # Token t asks; token s answers with what token s − 1 said; the first answers with nothing.
            said = torch.cat([torch.zeros(1, F, dtype=r.dtype), z[:t]])
            q = (extra[f"attn{layer}_W_q"] @ z[t] + extra[f"attn{layer}_b_q"]).view(heads, -1)
            k = (said @ extra[f"attn{layer}_W_k"].T + extra[f"attn{layer}_b_k"]).view(t + 1, heads, -1)
            v = (said @ extra[f"attn{layer}_W_v"].T + extra[f"attn{layer}_b_v"]).view(t + 1, heads, -1)
            weights = torch.einsum("he,she->hs", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
            mixed = torch.einsum("hs,shd->hd", weights, v).reshape(-1)
            guess = (extra[f"attn{layer}_W_o"] @ mixed + extra[f"attn{layer}_b_o"]).relu() @ coder.W_dec
            guesses[t] = guess * ((guess * r[t]).sum() / (guess.norm() + rule.eps) ** 2)
        predicted, r = predicted + guesses, r - guesses
    novel = (r * rule.z_scale @ coder.W_enc.T + coder.b_enc).relu()
    if rule.k is not None:
        best = novel.topk(rule.k)
        novel = torch.zeros_like(novel).scatter(-1, best.indices, best.values)
    return novel, novel @ coder.W_dec + predicted + coder.b_dec


@pytest.mark.parametrize("k", [None, 3])
def test_a_plain_loop_computes_the_same(k):
    coder, x = make(k=k), inputs(2, 7)
    out = coder(x)
    out.codes.check()
    assert out.codes.uniform_k == k
    for i in range(2):
        novel, whole = plain(coder, x[i])
        assert torch.allclose(out.codes.dense()[i], novel)
        assert torch.allclose(out.reconstruction[i], whole)


def test_later_tokens_and_other_sequences_are_not_seen():
    coder, x = make(), inputs(2, 6)
    whole = coder(x).reconstruction
    assert torch.allclose(coder(x[:, :4]).reconstruction, whole[:, :4])
    assert torch.allclose(coder(x[1:]).reconstruction, whole[1:])
    changed = x.clone()
    changed[0, 1] += 1
    other = coder(changed).reconstruction
    assert torch.allclose(other[1], whole[1]) and not torch.allclose(other[0, 2:], whole[0, 2:])


def test_sequences_by_number():
    coder, x = make(), inputs(6)
    numbers = torch.tensor([3, 3, 1, 1, 1, 3])
    codes = coder.encode(x, context=numbers)
    for number in (1, 3):
        rows = numbers == number
        assert torch.allclose(codes.select(rows).dense(), coder.encode(x[rows][None]).dense()[0])
    with pytest.raises(ConfigError, match="context numbers 5 tokens, x has 6"):
        coder.encode(x, context=numbers[:5])


def test_normalisation_and_prediction_both_come_back():
    coder, x = make(normalise={"kind": "layer_norm"}), inputs(1, 5)
    codes = coder.encode(x)
    assert set(codes.context) == {"mean", "std", "predicted"}
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    _, whole = plain(coder, ((x - mean) / (std + 1e-5))[0])
    assert torch.allclose(coder.decode(codes)[0], (whole * std + mean)[0])


def test_decoding_needs_what_was_predicted():
    coder = make()
    codes = coder.encode(inputs(1, 5))
    with pytest.raises(ValueError, match="decoding adds what earlier tokens predict, and these codes carry no context"):
        coder.decode_raw(codes.indices, codes.values, codes.offsets)


def test_fresh_attention_predicts_nothing():
    config = CoderConfig(d_in=D, n_latents=F, activation=Temporal(z_scale=1.0, n_heads=2, bottleneck=2))
    coder, x = SparseCoder(config).double(), inputs(1, 5)
    assert coder.encode(x).context["predicted"].abs().max() == 0
    _, z = coder.encode(x, return_pre=True)
    assert torch.allclose(coder.encode(x).dense(), z.relu())


def test_gradients_flow_through_attention():
    coder = make()
    coder(inputs(1, 4)).reconstruction.square().sum().backward()
    for name, parameter in coder.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) or "b_k" in name, name


def test_what_it_needs_of_a_coder():
    with pytest.raises(ConfigError, match="n_latents = 16 is not a multiple of bottleneck · n_heads = 15"):
        make(bottleneck=5, n_heads=3)
    with pytest.raises(ConfigError, match="a temporal coder needs gate_space 'raw' and d_out = d_in"):
        make(d_out=3, pre_bias="none").encode(inputs(2, 3))
    with pytest.raises(ConfigError, match="needs to know which tokens follow each other"):
        make().encode(inputs(3))
