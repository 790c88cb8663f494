"""Gemma Scope 2, several layers: each a coder, their writes add up."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, jump, normal, put, thresholds, weights
from unmix.coder import CoderSet
from unmix.core.errors import FormatError
from unmix.formats import detect, load, load_all

CLT = {
    "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output", "type": "clt", "l0": 150,
    "architecture": "jump_relu", "affine_connection": True, "width": 3 * F, "model_name": "google/gemma-3-270m-pt",
}  # fmt: skip
CROSS = CLT | {
    "hf_hook_point_in": "model.layers.{5,9,12}.output", "hf_hook_point_out": "model.layers.{5,9,12}.output",
    "type": "crosscoder", "affine_connection": False,
}  # fmt: skip


def layer(i: int, n: int = 3, affine: bool = False) -> dict[str, Tensor]:
    w = weights(seed=10 * i)
    W_dec = normal(F, n, D, seed=10 * i + 5)
    W_dec[:, :i] = 0
    extra = {"affine_skip_connection": normal(D, D, seed=10 * i + 6)} if affine else {}
    return {"w_enc": w["W_enc"], "w_dec": W_dec, "b_enc": w["b_enc"], "b_dec": w["b_dec"],
            "threshold": thresholds()} | extra  # fmt: skip


def folder(
    path: Path, config: dict[str, Any] | None = None, n: int = 3, affine: bool = False
) -> list[dict[str, Tensor]]:
    layers = [layer(i, n, affine) for i in range(n)]
    for i, w in enumerate(layers):
        put(path / f"params_layer_{i}.safetensors", w)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return layers


@torch.no_grad()
@pytest.mark.parametrize("affine", [True, False])
def test_the_outputs_of_all_layers(tmp_path, affine):
    layers = folder(tmp_path, CLT | {"affine_connection": affine}, affine=affine)
    coders = load_all(tmp_path)
    assert isinstance(coders, CoderSet) and list(coders) == ["layer_0", "layer_1", "layer_2"]
    x = {f"blocks.{i}.mlp_in": inputs(seed=i) for i in range(3)}
    written = coders.decode(coders.encode(x))
    f = [jump(x[f"blocks.{i}.mlp_in"] @ w["w_enc"] + w["b_enc"], w["threshold"]) for i, w in enumerate(layers)]
    for j, own in enumerate(layers):
        expected = sum(f[i] @ layers[i]["w_dec"][:, j] for i in range(3)) + own["b_dec"]
        if affine:
            expected = expected + x[f"blocks.{j}.mlp_in"] @ own["affine_skip_connection"]
        assert close(written[f"blocks.{j}.mlp_out_post"], expected)
    config = coders["layer_1"].config
    assert config.writes == ("blocks.1.mlp_out_post", "blocks.2.mlp_out_post")
    assert config.training["published"] == {"l0": 150.0}


def test_a_crosscoder_has_the_layers_of_its_config(tmp_path):
    folder(tmp_path, CROSS)
    coders = load_all(tmp_path)
    assert detect(tmp_path) == "gemma_scope_2_layers"
    assert isinstance(coders, CoderSet) and list(coders) == ["layer_5", "layer_9", "layer_12"]
    assert coders["layer_9"].config.reads == ("blocks.9.resid_post",)
    assert coders["layer_9"].config.writes == ("blocks.9.resid_post", "blocks.12.resid_post")
    one = load(tmp_path, name="layer_12")
    assert one.config.writes == ("blocks.12.resid_post",)
    with pytest.raises(FormatError, match="holds 3 coders whose writes add up; load_all gives them as one CoderSet"):
        load(tmp_path)
    alone = load(tmp_path / "params_layer_1.safetensors")
    assert alone.config.reads == ("blocks.9.resid_post",)


@pytest.mark.parametrize(
    ("path", "names", "read"),
    [
        ("crosscoder/layer_5_9_12_width_64k_l0_big", ["layer_5", "layer_9", "layer_12"], "resid_post"),
        ("clt/width_262k_l0_big", ["layer_0", "layer_1", "layer_2"], "mlp_in"),
    ],
)  # fmt: skip
def test_without_a_config_the_path_says_it(tmp_path, path, names, read):
    folder(tmp_path / path)
    coders = load_all(tmp_path / path)
    assert list(coders) == names
    assert coders[names[1]].config.reads == (f"blocks.{names[1][6:]}.{read}",)


def test_what_nothing_says(tmp_path):
    folder(tmp_path)
    with pytest.raises(FormatError, match=r"which hooks these layers read and write is in no config\.json beside them"):
        load_all(tmp_path, format="gemma_scope_2_layers")


def test_missing_layers(tmp_path):
    folder(tmp_path / "a", CLT | {"affine_connection": False})
    (tmp_path / "a" / "params_layer_2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"w_dec writes 3 layers, found 2 files and the layers 0, 1, 2"):
        load_all(tmp_path / "a")
    folder(tmp_path / "b", CROSS | {"hf_hook_point_in": "model.layers.{5,9}.output"})
    with pytest.raises(FormatError, match=r"w_dec writes 3 layers, found 3 files and the layers 5, 9 in config.json"):
        load_all(tmp_path / "b")


def test_weights_to_earlier_layers_are_left_out_and_said(tmp_path, caplog):
    layers = folder(tmp_path, CROSS)
    full = layers[1] | {"w_dec": torch.ones(F, 3, D)}
    put(tmp_path / "params_layer_1.safetensors", full)
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(tmp_path, name="layer_9")
    assert "params_layer_1.safetensors: w_dec also holds weights to earlier layers; they are left out" in caplog.text
    assert coder.W_dec.shape == (F, 2 * D)


def test_promised_skip(tmp_path):
    folder(tmp_path, CLT)
    with pytest.raises(FormatError, match="affine_connection is true, but there is no tensor affine_skip_connection"):
        load_all(tmp_path)
