"""Llama Scope: where its threshold lives, scales, and what is refused."""

from __future__ import annotations

import json
import logging
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, jump, put, run, weights
from unmix.core.errors import FormatError
from unmix.formats import detect, load

NORM_IN, NORM_OUT, THETA = 5.0, 2.0, 0.9


def stored() -> dict[str, Tensor]:
    w = weights()
    return {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T,
            "decoder.bias": w["b_dec"]}  # fmt: skip


def folder(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    tree = {
        "hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out", "d_model": D,
        "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": THETA, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM_IN, "out": NORM_OUT}, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True, "top_k": 50, "lp": 1,
    } | changes  # fmt: skip
    put(path / "checkpoints" / "final.safetensors", tensors or stored())
    (path / "hyperparams.json").write_text(json.dumps(tree))
    return path


def z_of(x: Tensor) -> Tensor:
    w = weights()
    return (x * sqrt(D) / NORM_IN) @ w["W_enc"] + w["b_enc"]


def test_the_threshold_is_in_raw_output_units(tmp_path, caplog):
    w, x = weights(), inputs()
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(folder(tmp_path / "Llama3_1-8B-Base-L8TC-8x"))
    codes, recon = run(coder, x)
    z, norms = z_of(x), w["W_dec"].norm(dim=-1)
    expected = jump(z, torch.tensor(THETA), z * norms * NORM_OUT / sqrt(D))
    assert not torch.equal(expected > 0, z > THETA) and not torch.equal(expected > 0, z * norms > THETA)
    assert close(codes, expected)
    assert close(recon, (expected @ w["W_dec"] + w["b_dec"]) * NORM_OUT / sqrt(D))
    assert coder.config.reads == ("blocks.8.ln2.hook_normalized",)
    assert coder.config.writes == ("blocks.8.mlp_out_post",)
    assert coder.config.model is not None and coder.config.model.name == "meta-llama/Llama-3.1-8B"
    assert coder.config.training["llama_scope"]["jump_relu_threshold"] == THETA
    assert not caplog.text


def test_without_decoder_norms_the_scale_is_the_inputs(tmp_path):
    x = inputs()
    codes, _ = run(load(folder(tmp_path / "a", sparsity_include_decoder_norm=False)), x)
    z = z_of(x)
    assert close(codes, jump(z, torch.tensor(THETA), z * NORM_IN / sqrt(D)))


def test_folded_files_have_no_scales(tmp_path):
    w, x = weights(), inputs()
    coder = load(folder(tmp_path / "a", norm_activation="inference"))
    z = x @ w["W_enc"] + w["b_enc"]
    assert close(run(coder, x)[0], jump(z, torch.tensor(THETA), z * w["W_dec"].norm(dim=-1)))
    assert detect(tmp_path / "a") == "llama_scope"


def test_topk_ranks_by_decoder_norm(tmp_path):
    w, x = weights(), inputs()
    codes, _ = run(load(folder(tmp_path / "a", act_fn="topk", top_k=4)), x)
    z = z_of(x).relu()
    best = (z * w["W_dec"].norm(dim=-1)).topk(4).indices
    assert close(codes, torch.zeros_like(z).scatter(-1, best, z.gather(-1, best)))


def test_a_bias_subtracted_and_one_that_is_missing(tmp_path):
    w, x = weights(), inputs()
    place = folder(
        tmp_path / "a", hook_point_out="blocks.8.ln2.hook_normalized", act_fn="relu",
        apply_decoder_bias_to_pre_encoder=True,
    )  # fmt: skip
    codes, _ = run(load(place), x)
    assert close(codes, ((x * sqrt(D) / NORM_IN - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu())
    bare = {k: v for k, v in stored().items() if k != "decoder.bias"}
    coder = load(folder(tmp_path / "b", bare, act_fn="relu", use_decoder_bias=False))
    assert not coder.b_dec.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "hyperparams.json: act_fn is 'gelu'. "),
        ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise'. "),
        ({"use_glu_encoder": True}, "use_glu_encoder is true: codes are then"),
        ({"dataset_average_activation_norm": {"in": 5.0}}, "dataset_average_activation_norm.out is missing"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "dataset_average_activation_norm.in is 0, expected"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold is null, expected a number"),
        ({"d_sae": 7}, "encoder.weight is [20, 6], expected [7, 6] (d_sae=7 from hyperparams.json; "),
        ({"use_decoder_bias": "x"}, 'use_decoder_bias is "x", expected true or false'),
    ],
)
def test_settings_that_cannot_be_kept(tmp_path, changes, message):
    with pytest.raises(FormatError) as caught:
        load(folder(tmp_path / "a", **changes))
    assert message in str(caught.value)


def test_tensors_that_do_not_fit(tmp_path):
    with pytest.raises(FormatError, match=r"final\.safetensors: unknown tensor encoder_glu.weight"):
        load(folder(tmp_path / "a", stored() | {"encoder_glu.weight": torch.ones(F, D)}))
    bare = {k: v for k, v in stored().items() if k != "decoder.bias"}
    with pytest.raises(FormatError, match=r"decoder.bias is missing"):
        load(folder(tmp_path / "b", bare))
