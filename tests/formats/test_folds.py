"""Every fold leaves outputs as they were, and says what becomes of the codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import FormatError
from unmix.formats.draft import Draft
from unmix.formats.folds import batchtopk_as_jumprelu, fold_input_bias, fold_scales, gate_to_raw, unit_decoder

KINDS: dict[str, dict[str, Any]] = {
    "relu": {"kind": "relu"},
    "topk": {"kind": "topk", "k": 3},
    "batchtopk": {"kind": "batchtopk", "k": 3},
    "jumprelu": {"kind": "jumprelu"},
    "gated": {"kind": "gated"},
    "groupmax": {"kind": "groupmax", "k": 3},
}


def make(kind: str, **config: Any) -> SparseCoder:
    """Every tensor at random, factors and thresholds above zero."""
    full = CoderConfig(d_in=6, n_latents=12, activation=KINDS[kind], **config)
    coder = SparseCoder(full).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value.abs() + 0.2 if name in ("threshold", "norm_scale", "gate_scale") else value)
    return coder


def same(coder: SparseCoder, draft: Draft, factor: torch.Tensor | None = None) -> None:
    """Outputs, and codes times `factor` [F], to 1e-5."""
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))
    other = draft.coder()
    with torch.no_grad():
        before, after = coder(x), other(x)
    dense = before.codes.dense() if factor is None else before.codes.dense() * factor
    torch.testing.assert_close(after.codes.dense(), dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.reconstruction, before.reconstruction, rtol=1e-5, atol=1e-5)
    assert before.codes.nonzero().nnz > 10


@pytest.mark.parametrize("pre_bias", ["none", "tied", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_input_bias(kind: str, pre_bias: str) -> None:
    coder = make(kind, pre_bias=pre_bias)
    folded = fold_input_bias(Draft.of(coder))
    assert folded.config.pre_bias == "none"
    same(coder, folded)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalise", [{}, {"kind": "standardise"}, {"kind": "standardise", "restore": False}])
@pytest.mark.parametrize("space", ["raw", "decoder_norm", "decoder_norm_sum", "own"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "gated"])
def test_scales(kind: str, space: str, normalise: dict[str, Any], skip: bool) -> None:
    coder = make(
        kind, gate_space=space, normalise=normalise, skip=skip, input_scale=0.5, output_scale=3.0, pre_bias="tied",
        reads=("a", "b"),
    )  # fmt: skip
    folded = fold_scales(Draft.of(coder))
    assert (folded.config.input_scale, folded.config.output_scale, folded.config.normalise.kind) == (1, 1, "none")
    assert folded.config.pre_bias == "none"
    same(coder, folded)


@pytest.mark.parametrize("space", ["decoder_norm", "decoder_norm_sum", "own"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_gate_to_raw(kind: str, space: str) -> None:
    coder = make(kind, gate_space=space, reads=("a", "b"))
    folded = gate_to_raw(Draft.of(coder))
    assert folded.config.gate_space == "raw"
    same(coder, folded)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "groupmax"])
def test_a_ranking_in_another_space_cannot_be_said_on_z(kind: str) -> None:
    with pytest.raises(FormatError, match=rf"{kind} ranks latents by z times a stored factor, which cannot"):
        gate_to_raw(Draft.of(make(kind, gate_space="own")))


@pytest.mark.parametrize(
    ("kind", "space"),
    [("relu", "raw"), ("jumprelu", "raw"), ("gated", "raw"), ("relu", "own"), ("jumprelu", "decoder_norm_sum")]
    + [(kind, "decoder_norm") for kind in KINDS],
)
def test_unit_decoder(kind: str, space: str) -> None:
    coder = make(kind, gate_space=space, reads=("a", "b"))
    with torch.no_grad():
        coder.W_dec[4] = 0
    norms = coder.W_dec.detach().norm(dim=-1)
    folded = unit_decoder(Draft.of(coder))
    wanted = torch.where(norms > 0, 1.0, 0.0)
    torch.testing.assert_close(folded.coder().W_dec.detach().norm(dim=-1), wanted)
    same(coder, folded, norms)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "groupmax"])
def test_raw_rankings_cannot_take_decoder_norms(kind: str) -> None:
    with pytest.raises(FormatError, match=rf"{kind} ranks latents by z, and folding decoder norms would rank them by"):
        unit_decoder(Draft.of(make(kind)))


def test_batchtopk_at_inference_is_one_threshold() -> None:
    coder = make("batchtopk", gate_space="decoder_norm")
    folded = batchtopk_as_jumprelu(Draft.of(coder))
    assert folded.config.activation.kind == "jumprelu"
    same(coder, folded)
    with torch.no_grad():
        coder.threshold.fill_(-1)
    with pytest.raises(FormatError, match="threshold was never calibrated, so there is none to write"):
        batchtopk_as_jumprelu(Draft.of(coder))
