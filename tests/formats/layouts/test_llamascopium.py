"""Llamascopium and R1-Distill: gates in the normalised space, each normalisation, and what is refused."""

from __future__ import annotations

import logging
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, jump, put, run, thresholds, weights
from unmix.core.errors import FormatError
from unmix.formats import detect, load

RESID, OUT = "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"
NORM = "dataset_average_activation_norm."


def stored(linear: bool = False, **extra: Tensor) -> dict[str, Tensor]:
    w = weights()
    named = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"],
             "activation_function.log_jumprelu_threshold": thresholds().log()}  # fmt: skip
    if linear:
        named = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
                 "decoder.bias": w["b_dec"], "log_jumprelu_threshold": thresholds().log()}  # fmt: skip
    return named | {NORM + RESID: torch.tensor(5.0)} | extra


def folder(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    tree = {
        "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True, "act_fn": "jumprelu",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": 5,
        "hook_point_in": RESID, "hook_point_out": RESID, "use_glu_encoder": False, "jumprelu_threshold_window": 2.0,
    } | changes  # fmt: skip
    return put(path / "sae_weights.safetensors", tensors or stored(), config=tree)


def ranked(x: Tensor, k: int) -> Tensor:
    """Codes of a top-k that ranks by decoder norm."""
    w = weights()
    z = (x @ w["W_enc"] + w["b_enc"]).relu()
    best = (z * w["W_dec"].norm(dim=-1)).topk(k).indices
    return torch.zeros_like(z).scatter(-1, best, z.gather(-1, best))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_the_gate_is_in_the_normalised_space(tmp_path, caplog, linear, include):
    w, x = weights(), inputs()
    place = folder(tmp_path / "a", stored(linear), sparsity_include_decoder_norm=include)
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(place)
    codes, recon = run(coder, x)
    z = (x * sqrt(D) / 5) @ w["W_enc"] + w["b_enc"]
    expected = jump(z, thresholds(), z * w["W_dec"].norm(dim=-1) if include else z)
    assert close(codes, expected) and close(recon, (expected @ w["W_dec"] + w["b_dec"]) * 5 / sqrt(D))
    assert detect(place) == "llamascopium" and coder.config.reads == ("blocks.3.resid_post",)
    assert coder.config.training["llamascopium"]["act_fn"] == "jumprelu"
    assert not caplog.text


def test_a_transcoder_has_two_norms(tmp_path):
    w, x = weights(), inputs()
    coder = load(folder(tmp_path / "a", stored(**{NORM + OUT: torch.tensor(0.5)}), hook_point_out=OUT))
    codes, recon = run(coder, x)
    assert close(recon, (codes @ w["W_dec"] + w["b_dec"]) * 0.5 / sqrt(D))
    assert coder.config.writes == ("blocks.3.mlp_out_post",)


def test_inference_files_apply_no_scale(tmp_path):
    w, x = weights(), inputs()
    # What stands under the norm's name then is not a norm.
    place = folder(tmp_path / "a", stored(**{NORM + RESID: torch.tensor(0.0)}), norm_activation="inference")
    codes, _ = run(load(place), x)
    z = x @ w["W_enc"] + w["b_enc"]
    assert close(codes, jump(z, thresholds(), z * w["W_dec"].norm(dim=-1)))


def test_token_wise_topk(tmp_path):
    w, x = weights(), inputs()
    tensors = {k: v for k, v in stored().items() if "jumprelu" not in k}
    codes, recon = run(load(folder(tmp_path / "a", tensors, act_fn="topk", norm_activation="token-wise")), x)
    scale = sqrt(D) / x.norm(dim=-1, keepdim=True)
    assert close(codes, ranked(x * scale, 5))
    assert close(recon, (codes @ w["W_dec"] + w["b_dec"]) / scale)


def test_batchtopk_has_no_threshold_of_its_own(tmp_path):
    tensors = {k: v for k, v in stored().items() if "jumprelu" not in k}
    coder = load(folder(tmp_path / "a", tensors, act_fn="batchtopk", norm_activation="inference"))
    assert coder.config.activation.kind == "batchtopk" and coder.config.gate_space == "decoder_norm"
    assert float(coder.threshold) == -1.0
    w, x = weights(), inputs()
    z = (x @ w["W_enc"] + w["b_enc"]).relu()
    gate = z * w["W_dec"].norm(dim=-1)
    least = gate.flatten().topk(5 * len(x)).values[-1]
    assert close(run(coder.train(), x)[0], torch.where(gate >= least, z, 0.0))


def test_relu_without_a_bias(tmp_path):
    tensors = {k: v for k, v in stored().items() if "jumprelu" not in k and k != "b_D"}
    coder = load(folder(tmp_path / "a", tensors, act_fn="relu", use_decoder_bias=False))
    assert not coder.b_dec.any() and coder.config.activation.kind == "relu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae_type": "clt"}, "config.json: sae_type is 'clt'. Allowed: sae."),
        ({"act_fn": "layertopk"}, "act_fn is 'layertopk'. Did you mean"),
        ({"use_glu_encoder": True}, "use_glu_encoder is true: codes are then z·sigmoid(x·W_glu + b_glu)"),
        ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise': codes would depend on the other tokens"),
        (
            {"norm_activation": "token-wise", "hook_point_out": OUT},
            "norm_activation is 'token-wise': the norm of a transcoder's output is not in its input",
        ),
        ({"hook_point_out": OUT}, f"'dataset-wise', but sae_weights.safetensors holds no {NORM}{OUT}"),
        ({"expansion_factor": 2}, "W_E is [6, 20], expected [6, 12] (d_model=6 from config.json; d_sae=12 from config"),
        ({"hook_point_in": None}, "hook_point_in is null, expected a string"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_kept(tmp_path, changes, message):
    with pytest.raises(FormatError) as caught:
        load(folder(tmp_path / "a", **changes))
    assert message in str(caught.value)


def test_tensors_that_do_not_fit(tmp_path):
    with pytest.raises(FormatError, match="unknown tensor W_E_glu, b_E_glu"):
        load(folder(tmp_path / "a", stored(W_E_glu=torch.ones(D, F), b_E_glu=torch.ones(F))))
    with pytest.raises(FormatError, match=f"{NORM}.* in sae_weights.safetensors is 0.0, expected a number above 0"):
        load(folder(tmp_path / "b", stored(**{NORM + RESID: torch.tensor(0.0)})))
    tensors = {k: v for k, v in stored().items() if "jumprelu" not in k}
    with pytest.raises(
        FormatError, match=r"activation_function\.log_jumprelu_threshold or log_jumprelu_threshold is mis"
    ):
        load(folder(tmp_path / "c", tensors))


def test_unknown_keys_are_said_and_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(folder(tmp_path / "a", brand_new=3))
    assert "config.json: keys kept but not understood: brand_new" in caplog.text
    assert coder.config.training["llamascopium"]["brand_new"] == 3
