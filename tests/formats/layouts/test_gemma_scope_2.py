"""Gemma Scope 2, single layers: the maths, hooks of configs and paths, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, jump, normal, put, run, thresholds, weights
from unmix.core.errors import FormatError
from unmix.formats import detect, load

BEFORE = "model.layers.3.pre_feedforward_layernorm.output"
AFTER = "model.layers.3.post_feedforward_layernorm.output"


def stored(d_out: int = D, **extra: Tensor) -> dict[str, Tensor]:
    w = weights(d_out=d_out)
    return {"w_enc": w["W_enc"], "w_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"],
            "threshold": thresholds()} | extra  # fmt: skip


def config(**changes: Any) -> dict[str, Any]:
    return {
        "hf_hook_point_in": "model.layers.3.output", "hf_hook_point_out": "model.layers.3.output", "width": F,
        "model_name": "google/gemma-3-1b-pt", "architecture": "jump_relu", "l0": 50, "affine_connection": False,
        "type": "sae",
    } | changes  # fmt: skip


def folder(path: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    return put(path / "params.safetensors", tensors, config=config(**changes))


def test_sae(tmp_path, caplog):
    w, x = stored(), inputs()
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(folder(tmp_path / "a", w))
    codes, recon = run(coder, x)
    expected = jump(x @ w["w_enc"] + w["b_enc"], w["threshold"])
    assert close(codes, expected) and close(recon, expected @ w["w_dec"] + w["b_dec"])
    assert coder.config.reads == coder.config.writes == ("blocks.3.resid_post",)
    assert coder.config.training["published"] == {"l0": 50.0}
    assert coder.config.training["gemma_scope_2"]["width"] == F
    assert coder.config.model is not None and coder.config.model.name == "google/gemma-3-1b-pt"
    assert not caplog.text


def test_affine_transcoders_add_the_transpose_of_a_skip(tmp_path):
    affine = normal(D, 5, seed=4)
    w, x = stored(5, affine_skip_connection=affine), inputs()
    place = folder(
        tmp_path / "a", w, hf_hook_point_in=BEFORE, hf_hook_point_out=AFTER, affine_connection=True, type="transcoder"
    )
    coder = load(place)
    codes, recon = run(coder, x)
    assert close(recon, codes @ w["w_dec"] + w["b_dec"] + x @ affine)
    assert (coder.config.reads, coder.config.writes) == (("blocks.3.mlp_in",), ("blocks.3.mlp_out_post",))


@pytest.mark.parametrize(
    ("site", "reads", "writes"),
    [
        ("resid_post/layer_12_width_16k_l0_small", "blocks.12.resid_post", "blocks.12.resid_post"),
        ("mlp_out_all/layer_12_width_16k_l0_small_seed_1", "blocks.12.mlp_out_post", "blocks.12.mlp_out_post"),
        ("attn_out_all/layer_12_width_16k_l0_big", "blocks.12.z", "blocks.12.z"),
        ("transcoder_all/layer_12_width_262k_l0_small_affine", "blocks.12.mlp_in", "blocks.12.mlp_out_post"),
    ],
)
def test_without_a_config_the_path_says_it(tmp_path, caplog, site, reads, writes):
    place = tmp_path / "google/gemma-scope-2-4b-it" / site
    put(place / "params.safetensors", stored())
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(place)
    assert detect(place) == "gemma_scope_2"
    assert (coder.config.reads, coder.config.writes) == ((reads,), (writes,))
    assert coder.config.model is not None and coder.config.model.name == "google/gemma-3-4b-it"
    assert not caplog.text


def test_what_neither_says(tmp_path, caplog):
    put(tmp_path / "a" / "params.safetensors", stored())
    with caplog.at_level(logging.WARNING, logger="unmix"):
        assert load(tmp_path / "a").config.reads == ("input",)
    assert "the hook that it reads is not in the file, and was not found in config.json or its path" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "config.json: architecture is 'topk'. Allowed: jump_relu."),
        ({"affine_connection": True}, "affine_connection is true, but there is no tensor affine_skip_connection"),
        ({"affine_connection": "no"}, 'affine_connection is "no", expected true or false'),
        ({"hf_hook_point_in": 3}, "hf_hook_point_in is 3, expected a string"),
        ({"l0": "many"}, 'l0 is "many", expected a number'),
    ],
)
def test_settings_that_cannot_be_kept(tmp_path, changes, message):
    with pytest.raises(FormatError) as caught:
        load(folder(tmp_path / "a", stored(), **changes))
    assert message in str(caught.value)


def test_unknown_keys_are_said_and_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(folder(tmp_path / "a", stored(), brand_new=3))
    assert "config.json: keys kept but not understood: brand_new" in caplog.text
    assert coder.config.training["gemma_scope_2"]["brand_new"] == 3


def test_wrong_tensors(tmp_path):
    w = stored()
    with pytest.raises(FormatError, match=r"w_dec is \[6, 20\], expected \[20, 6\]"):
        load(folder(tmp_path / "a", w | {"w_dec": w["w_dec"].T}))
    with pytest.raises(FormatError, match="unknown tensor extra; expected w_enc, b_enc, b_dec, w_dec"):
        load(folder(tmp_path / "b", w | {"extra": torch.ones(1)}))
    with pytest.raises(FormatError, match=r"affine_skip_connection is \[5, 6\], expected \[6, 6\]"):
        load(folder(tmp_path / "c", w | {"affine_skip_connection": torch.ones(5, D)}))
