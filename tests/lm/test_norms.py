from __future__ import annotations

import pytest
import torch
from torch import nn

from lm.families import tiny
from unmix.core.errors import ModelError
from unmix.lm.norms import linear_norm

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def test_norms_are_told_apart() -> None:
    layer = linear_norm(tiny("gpt2").points.last_norm, 16)  # type: ignore[arg-type]
    root = linear_norm(tiny("gemma2").points.last_norm, 16)  # type: ignore[arg-type]
    assert layer.centred and not root.centred
    torch.testing.assert_close(layer.gain, tiny("gpt2").model.transformer.ln_f.weight.detach(), **CLOSE)
    torch.testing.assert_close(layer.bias, tiny("gpt2").model.transformer.ln_f.bias.detach(), **CLOSE)
    torch.testing.assert_close(root.gain, 1 + tiny("gemma2").model.model.norm.weight.detach(), **CLOSE)


def test_an_odd_width_and_another_module() -> None:
    odd = nn.LayerNorm(7)
    with torch.no_grad():
        odd.weight.copy_(torch.randn(7))
        odd.bias.copy_(torch.randn(7))
    found = linear_norm(odd, 7)
    torch.testing.assert_close(found.gain, odd.weight.detach(), **CLOSE)
    torch.testing.assert_close(found.bias, odd.bias.detach(), **CLOSE)
    with pytest.raises(ModelError, match="Tanh is neither a LayerNorm nor an RMSNorm"):
        linear_norm(nn.Tanh(), 8)


def test_a_bfloat16_norm_is_read_exactly() -> None:
    norm = nn.LayerNorm(16, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
        norm.bias.copy_(torch.randn(16) * 20)
    found = linear_norm(norm, 16)
    torch.testing.assert_close(found.gain, norm.weight.detach().float(), **CLOSE)
    torch.testing.assert_close(found.bias, norm.bias.detach().float(), **CLOSE)
    assert norm.weight.dtype == torch.bfloat16


def test_norms_of_heads_and_norms_without_weights() -> None:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    heads = CohereLayerNorm(hidden_size=(4, 8))
    with torch.no_grad():
        heads.weight.copy_(torch.randn(4, 8))
    found = linear_norm(heads, 8)
    assert found.centred
    torch.testing.assert_close(found.gain, heads.weight.detach(), **CLOSE)
    plain = linear_norm(nn.LayerNorm(16, elementwise_affine=False), 16)
    torch.testing.assert_close(plain.gain, torch.ones(1), **CLOSE)


def test_what_hangs_on_a_norm_is_not_called() -> None:
    norm = nn.LayerNorm(8)
    norm.register_forward_hook(lambda *_: pytest.fail("a hook of the model's norm ran"))
    assert linear_norm(norm, 8).centred
