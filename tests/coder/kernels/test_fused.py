"""The wired step: gradients by autograd against dense float64, and whole training steps against torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unmix.coder.activations.selection import top_lowest
from unmix.coder.kernels.adam import Adam, Dictionary, Row
from unmix.coder.kernels.fused import Relu, fused_topk, fused_topk_step
from unmix.core.errors import NonFiniteError

# The interpreter is numpy, which warns where a card does not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def parameters(device: str, F: int = 22, d_in: int = 9, d_out: int = 9) -> dict[str, Tensor]:
    """Of a top-k coder."""
    made = {
        "W_enc": torch.randn(F, d_in), "b_enc": torch.randn(F), "b_pre": torch.randn(d_in),
        "W_dec": torch.nn.functional.normalize(torch.randn(F, d_out), dim=-1), "b_dec": torch.randn(d_out),
    }  # fmt: skip
    return {name: tensor.to(device).requires_grad_() for name, tensor in made.items()}


def dense(p: dict[str, Tensor], x: Tensor, k: int, relu: Relu, magnitude: bool) -> tuple[Tensor, Tensor]:
    """`(reconstruction, values [t, k])` as anybody would write it."""
    z = (x - p["b_pre"]) @ p["W_enc"].T + p["b_enc"]
    gate = z.abs() if magnitude else z.relu() if relu == "before" else z
    ids = top_lowest(gate.detach(), k)
    values = z.gather(1, ids) if relu == "none" else z.gather(1, ids).relu()
    return torch.zeros_like(z).scatter(1, ids, values) @ p["W_dec"] + p["b_dec"], values


@pytest.mark.parametrize(("relu", "magnitude"), [("after", False), ("none", True)])
def test_autograd(device: str, relu: Relu, magnitude: bool) -> None:
    """Values and all six gradients, with a loss on the values as well as on the reconstruction."""
    p = parameters(device, d_out=5)
    x = torch.randn(4, 9, device=device, requires_grad=True)
    q = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    x64 = x.detach().double().requires_grad_()
    weight = torch.randn(4, 5, device=device)
    y, values, indices, _ = fused_topk(
        x, p["W_enc"], p["b_enc"], p["b_pre"], p["W_dec"], p["b_dec"], 6, relu, magnitude, low=torch.float32
    )
    (((y - weight).square()).sum() + (values**3).sum()).backward()
    y64, values64 = dense(q, x64, 6, relu, magnitude)
    (((y64 - weight).square()).sum() + (values64**3).sum()).backward()
    assert indices.view(4, 6).diff(dim=1).gt(0).all()
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.view(4, 6).double(), values64, rtol=1e-5, atol=1e-5)
    for mine, theirs in [(x, x64), *((p[name], q[name]) for name in p)]:
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_training_steps(device: str, clip: float | None) -> None:
    """Two steps with a tied bias, in float32: the weights of torch's Adam with projection, clipping and unit rows."""
    p = parameters(device)
    dictionary = Dictionary(
        Row.fresh(p["W_dec"].clone()), Row.fresh(p["W_enc"].clone(), torch.float32, spare=True),
        Row.fresh(p["b_enc"].clone()),
    )  # fmt: skip
    b_dec = Row.fresh(p["b_dec"].clone())
    q = {name: p[name].detach().double().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    optimiser = torch.optim.Adam(q.values(), lr=0.01)
    for step in (1, 2):
        x = torch.randn(4, 9, device=device)
        result = fused_topk_step(dictionary, b_dec, x, 3, Adam(0.01, step), 2.0, clip)
        y, _ = dense({**q, "b_pre": q["b_dec"]}, x.double(), 3, "after", False)
        loss = (y - x).square().sum() / (4 * 2.0)
        optimiser.zero_grad()
        loss.backward()
        grad = q["W_dec"].grad
        assert grad is not None
        grad -= (grad * q["W_dec"].detach()).sum(-1, keepdim=True) * q["W_dec"].detach()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(q.values()), clip)
        optimiser.step()
        with torch.no_grad():
            q["W_dec"].div_(q["W_dec"].norm(dim=-1, keepdim=True))
        torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
    found: dict[str, Tensor] = {
        "W_dec": dictionary.dec.weight, "W_enc": dictionary.enc.weight, "b_enc": dictionary.bias.weight,
        "b_dec": b_dec.weight,
    }  # fmt: skip
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), q[name].detach(), rtol=1e-4, atol=1e-4)


def test_what_is_no_number_moves_no_weight(device: str) -> None:
    """A NaN in the input is refused by name and row, in both ways of stepping and in the autograd function."""
    p = parameters(device)
    x = torch.randn(3, 9, device=device)
    x[1, 4] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"^the input holds NaN or infinity in 1 of 3 rows \(1\); no weight moved$"
    ):
        fused_topk(x, p["W_enc"], p["b_enc"], None, p["W_dec"], p["b_dec"], 2, low=torch.float32)
    rows: Any = [p[name].detach() for name in ("W_dec", "W_enc", "b_enc")]
    for bad, message in ((x, "the input holds NaN"), (x.nan_to_num() * 1e30, "the loss is inf")):
        clip = None if bad is x else 1.0
        dictionary = Dictionary(*(Row.fresh(w.clone(), torch.float32, spare=True) for w in rows))
        b_dec = Row.fresh(p["b_dec"].clone())
        with pytest.raises(NonFiniteError, match=message):
            fused_topk_step(dictionary, b_dec, bad, 2, Adam(0.1, 1), 1.0, clip)
        assert torch.equal(dictionary.dec.weight, rows[0]) and torch.equal(b_dec.weight, p["b_dec"])
        assert torch.equal(dictionary.enc.weight, rows[1]) and not dictionary.enc.first.any()
