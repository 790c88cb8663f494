"""Coders built by hand from the peers' own checkpoints give the peers' own codes and reconstructions.

Layouts and maths as published (each test says what is peculiar); recorded with the peers' packages, random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder


def build(weights: Mapping[str, Tensor], activation: dict[str, Any], **config: Any) -> SparseCoder:
    """A coder with these tensors, latent-major."""
    n, d_in = weights["W_enc"].shape
    full = CoderConfig(d_in=d_in, d_out=weights["W_dec"].shape[1], n_latents=n, activation=activation, **config)
    coder = SparseCoder(full)
    coder.load_state_dict(dict(weights))
    return coder.eval()


def compare(coder: SparseCoder, expected: Mapping[str, Tensor], codes: str = "acts", output: str = "recon") -> None:
    """Codes and reconstruction to 1e-5."""
    with torch.no_grad():
        out = coder(expected["x"])
    out.codes.check()
    torch.testing.assert_close(out.codes.dense(), expected[codes], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.reconstruction, expected[output], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="session")
def parity(shared: Path) -> Path:
    """The recorded outputs."""
    return shared / "parity"


def sae_lens(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`(weights, expected)`; the encoder is stored `[d, F]`."""
    weights = load_file(folder / "sae_weights.safetensors")
    return {**weights, "W_enc": weights["W_enc"].T}, load_file(folder / "expected.safetensors")


def test_sae_lens_standard(parity: Path) -> None:
    """b_dec is subtracted from the input."""
    weights, expected = sae_lens(parity / "sae_lens" / "standard_inference")
    compare(build(weights, {"kind": "relu"}), expected)


def test_sae_lens_layer_norm(parity: Path) -> None:
    """The unbiased std plus 1e-5 on the way in, the bare std on the way back."""
    weights, expected = sae_lens(parity / "sae_lens" / "standard_layer_norm")
    compare(build(weights, {"kind": "relu"}, normalise={"kind": "layer_norm", "eps": 1e-5, "ddof": 1}), expected)


def test_sae_lens_jumprelu(parity: Path) -> None:
    """z where z > θ."""
    weights, expected = sae_lens(parity / "sae_lens" / "jumprelu_inference")
    compare(build(weights, {"kind": "jumprelu"}), expected)


def test_sae_lens_topk(parity: Path) -> None:
    """Selected in the decoder's space; its codes are multiplied by the decoder norm, ours are not."""
    weights, expected = sae_lens(parity / "sae_lens" / "topk_inference")
    coder = build(weights, {"kind": "topk", "k": 16, "relu": "before"}, gate_space="decoder_norm")
    codes = {**expected, "acts": expected["acts"] / weights["W_dec"].norm(dim=-1)}
    compare(coder, codes)


def test_sae_lens_batchtopk_in_training(parity: Path) -> None:
    """The same space; selection over the batch of 32 tokens."""
    weights, expected = sae_lens(parity / "sae_lens" / "batchtopk_training")
    weights["threshold"] = weights.pop("topk_threshold").float()
    coder = build(weights, {"kind": "batchtopk", "k": 16}, gate_space="decoder_norm").train()
    assert float(coder.encode(expected["x"]).l0().double().mean()) == 16.0
    compare(coder, {**expected, "acts": expected["acts"] / weights["W_dec"].norm(dim=-1)})


def test_sae_lens_transcoder(parity: Path) -> None:
    """64 in, 48 out, nothing subtracted."""
    weights, expected = sae_lens(parity / "sae_lens" / "transcoder")
    compare(build(weights, {"kind": "relu"}, pre_bias="none"), expected, output="forward")


@pytest.mark.parametrize(("kind", "pre_bias"), [("topk", "tied"), ("transcoder", "none")])
def test_sparsify(parity: Path, kind: str, pre_bias: str) -> None:
    """relu, then top-k; transcoders subtract nothing."""
    folder = parity / "sparsify" / kind
    stored, expected = load_file(folder / "sae.safetensors"), load_file(folder / "expected.safetensors")
    weights = {
        "W_enc": stored["encoder.weight"], "b_enc": stored["encoder.bias"], "W_dec": stored["W_dec"],
        "b_dec": stored["b_dec"],
    }  # fmt: skip
    coder = build(weights, {"kind": "topk", "k": 16, "relu": "before"}, pre_bias=pre_bias)
    compare(coder, expected)
    codes = coder.encode(expected["x"])
    ids, order = expected["top_indices"].sort(-1)
    assert torch.equal(codes.topk_view()[0].long(), ids)
    torch.testing.assert_close(codes.topk_view()[1], expected["top_acts"].gather(-1, order), rtol=1e-5, atol=1e-5)


def test_sparsify_skip_transcoder(parity: Path) -> None:
    """`y = f W_dec + b_dec + x W_skipᵀ`: the recorded output with a skip of our own added by hand."""
    folder = parity / "sparsify" / "transcoder"
    stored, expected = load_file(folder / "sae.safetensors"), load_file(folder / "expected.safetensors")
    skip = torch.randn(64, 64)
    weights = {
        "W_enc": stored["encoder.weight"], "b_enc": stored["encoder.bias"], "W_dec": stored["W_dec"],
        "b_dec": stored["b_dec"], "W_skip": skip,
    }  # fmt: skip
    coder = build(weights, {"kind": "topk", "k": 16, "relu": "before"}, pre_bias="none", skip=True)
    recon = expected["decode_no_skip"] + expected["x"] @ skip.T
    compare(coder, {**expected, "recon": recon})


def test_dictionary_learning_standard(parity: Path) -> None:
    """Its loader makes decoder columns unit-norm and rescales encoder and bias to match."""
    folder = parity / "dictionary_learning" / "standard"
    stored = torch.load(folder / "ae.pt", weights_only=True)
    norms = stored["decoder.weight"].norm(dim=0)
    weights = {
        "W_enc": stored["encoder.weight"] * norms[:, None], "b_enc": stored["encoder.bias"] * norms,
        "W_dec": (stored["decoder.weight"] / norms).T, "b_dec": stored["bias"],
    }  # fmt: skip
    compare(build(weights, {"kind": "relu"}), load_file(folder / "expected.safetensors"))


def test_dictionary_learning_topk(parity: Path) -> None:
    """relu, then top-k by default; with its threshold it is a jumprelu of one θ."""
    folder = parity / "dictionary_learning" / "topk"
    stored = torch.load(folder / "ae.pt", weights_only=True)
    expected = load_file(folder / "expected.safetensors")
    weights = {
        "W_enc": stored["encoder.weight"], "b_enc": stored["encoder.bias"], "W_dec": stored["decoder.weight"].T,
        "b_dec": stored["b_dec"],
    }  # fmt: skip
    compare(build(weights, {"kind": "topk", "k": int(stored["k"]), "relu": "before"}), expected)
    gated = {**weights, "threshold": stored["threshold"].float().expand(512)}
    with torch.no_grad():
        codes = build(gated, {"kind": "jumprelu"}).encode(expected["x"])
    torch.testing.assert_close(codes.dense(), expected["acts_use_threshold_true"], rtol=1e-5, atol=1e-5)


def test_e2e_sae_standard(parity: Path) -> None:
    """Decoder columns are normalised at every forward, nothing is subtracted."""
    folder = parity / "e2e_sae" / "standard"
    stored = torch.load(folder / "samples_1000.pt", weights_only=True)
    part = {key.split(".", 1)[1]: tensor for key, tensor in stored.items()}
    weights = {
        "W_enc": part["encoder.0.weight"], "b_enc": part["encoder.0.bias"],
        "W_dec": torch.nn.functional.normalize(part["decoder.weight"], dim=0).T, "b_dec": part["decoder.bias"],
    }  # fmt: skip
    compare(build(weights, {"kind": "relu"}, pre_bias="none"), load_file(folder / "expected.safetensors"))
