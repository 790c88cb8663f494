"""Matching pursuit: steps by hand, a plain loop, stopping rules, gradients, and what it needs of a coder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.coder.config import CoderConfig, MatchingPursuit
from unmix.coder.encoders import matching_pursuit
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError

D, F = 5, 12


def make(n_latents: int = F, d: int = D, seed: int = 0, **rule: Any) -> SparseCoder:
    """Unit atoms, the encoder their copy; a bias that is subtracted and added back."""
    fields = {key: rule.pop(key) for key in ("pre_bias", "gate_space", "d_out") if key in rule}
    config = CoderConfig(d_in=d, n_latents=n_latents, activation=MatchingPursuit(**rule), **fields)
    coder = SparseCoder(config, seed=seed).double()
    with torch.no_grad():
        coder.b_dec.copy_(torch.linspace(-0.5, 0.5, config.width_out))
    return coder


def plain(coder: SparseCoder, x: Tensor) -> Tensor:
    """Dense codes of one token at a time."""
    rule: Any = coder.config.activation
    W_enc, W_dec = coder.W_enc.detach(), coder.W_dec.detach()
    found = torch.zeros(len(x), coder.n_latents, dtype=x.dtype)
    for code, token in zip(found, x, strict=True):
        r = token - coder.b_dec.detach()
        for _ in range(rule.max_iterations or coder.config.d_in):
            z = W_enc @ r + coder.b_enc.detach()
            best = int(z.argmax())
            value = max(float(z[best]), 0.0)
            grown = value > 0 and code[best] == 0
            code[best] += value
            r = r - value * W_dec[best]
            if (rule.stop_on_duplicate_support and not grown) or float(r.norm()) < rule.residual_threshold:
                break
    return found


def inputs(rows: int = 40, d: int = D) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


RULES = [
    {"residual_threshold": 0.5},
    {"residual_threshold": 0.0, "stop_on_duplicate_support": False, "max_iterations": 9},
    {"residual_threshold": 1.5, "stop_on_duplicate_support": False},
    {"residual_threshold": 0.0, "max_iterations": 1},
]


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_loop_finds_the_same(rule):
    coder, x = make(**rule), inputs()
    with torch.no_grad():
        coder.b_enc.copy_(torch.linspace(-0.2, 0.2, F))
    codes = coder.encode(x.view(4, 10, D))
    codes.check()
    expected = plain(coder, x)
    assert torch.allclose(codes.dense().view(40, F), expected)
    assert (codes.values > 0).all() and codes.leading == (4, 10)


def test_orthogonal_atoms_are_found_in_one_step_each():
    coder = make(n_latents=D, residual_threshold=0.0, pre_bias="none")
    with torch.no_grad():
        coder.W_dec.copy_(torch.eye(D))
        coder.W_enc.copy_(torch.eye(D))
        coder.b_dec.zero_()
    x = torch.tensor([[3.0, -1.0, 0.0, 2.0, 0.5]], dtype=torch.float64)
    out = coder(x)
    assert out.codes.dense().tolist() == [[3.0, 0.0, 0.0, 2.0, 0.5]]
    assert out.reconstruction.tolist() == [[3.0, 0.0, 0.0, 2.0, 0.5]]


def test_the_residual_decides_when_a_token_is_done():
    x = inputs()
    coarse, fine = make(residual_threshold=2.0), make(residual_threshold=0.01)
    errors = [(coder(x).reconstruction - x).norm(dim=-1) for coder in (coarse, fine)]
    assert (coarse.encode(x).l0() < fine.encode(x).l0()).any()
    assert errors[1].mean() < errors[0].mean()


def test_tiles_change_nothing(monkeypatch):
    coder, x = make(residual_threshold=0.1), inputs()
    whole = coder.encode(x).dense()
    monkeypatch.setattr(matching_pursuit, "tile_rows", lambda *_: 7)
    assert torch.equal(coder.encode(x).dense(), whole)


def test_an_empty_batch():
    codes = make().encode(torch.zeros(0, D, dtype=torch.float64))
    assert codes.rows == 0 and codes.nnz == 0


def test_gradients_reach_encoder_and_decoder():
    coder, x = make(residual_threshold=0.3), inputs(6)
    assert torch.autograd.gradcheck(
        lambda W, V, b: torch.func.functional_call(
            coder, {"W_enc": W, "W_dec": V, "b_dec": b}, (x,)
        ).reconstruction,
        (coder.W_enc.detach().requires_grad_(), coder.W_dec.detach().requires_grad_(),
         coder.b_dec.detach().requires_grad_()),
    )  # fmt: skip


def test_first_scores_are_the_pre_activations():
    coder, x = make(), inputs()
    _, z = coder.encode(x, return_pre=True)
    assert torch.allclose(z, (x - coder.b_dec) @ coder.W_enc.T + coder.b_enc)


@pytest.mark.parametrize("fields", [{"gate_space": "decoder_norm"}, {"d_out": 3, "pre_bias": "none"}])
def test_what_it_needs_of_a_coder(fields):
    with pytest.raises(ConfigError, match="it needs gate_space 'raw' and d_out = d_in"):
        make(**fields).encode(inputs())
