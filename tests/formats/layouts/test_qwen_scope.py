"""Qwen Scope: k and hook from config or path, several layers in a folder, negative codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, run, weights
from unmix.core.errors import FormatError
from unmix.formats import detect, load, load_all

NAME = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"


def stored(seed: int = 0) -> dict[str, Tensor]:
    w = weights(seed=seed)
    return {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous(), "b_enc": w["b_enc"] - 5,
            "b_dec": w["b_dec"]}  # fmt: skip


def folder(path: Path, layers: tuple[int, ...] = (3,), config: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        torch.save(stored(layer), path / f"layer{layer}.sae.pt")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D, "d_sae": F, "k": 5,
            "num_layers": 28, "hook_point": "resid_post", "dtype": "float32"} | changes  # fmt: skip


def test_topk_without_a_relu(tmp_path, caplog):
    w, x = stored(3), inputs()
    place = folder(tmp_path / "a", config=config())
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(place)
    codes, recon = run(coder, x)
    z = x @ w["W_enc"].T + w["b_enc"]
    best = z.topk(5)
    assert (best.values < 0).any()
    expected = torch.zeros_like(z).scatter(-1, best.indices, best.values)
    assert close(codes, expected) and close(recon, expected @ w["W_dec"].T + w["b_dec"])
    assert detect(place) == "qwen_scope" and coder.config.reads == ("blocks.3.resid_post",)
    assert coder.config.model is not None and coder.config.model.name == "Qwen/Qwen3-1.7B-Base"
    assert coder.config.training["qwen_scope"]["num_layers"] == 28
    assert not caplog.text


def test_layers_of_a_repository(tmp_path):
    place = folder(tmp_path / "a", (3, 11), config())
    coders = load_all(place)
    assert list(coders) == ["layer3", "layer11"]
    assert coders["layer11"].config.reads == ("blocks.11.resid_post",)
    with pytest.raises(FormatError, match="holds 2 coders: layer3, layer11; name one with name=…, or use load_all"):
        load(place)
    assert load(place / "layer11.sae.pt").config.reads == load(place, name="layer11").config.reads


def test_k_of_the_path(tmp_path, caplog):
    place = folder(tmp_path / "Qwen" / NAME)
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(place / "layer3.sae.pt")
    assert coder.config.activation.model_dump()["k"] == 5
    assert coder.config.model is not None and coder.config.model.name == "Qwen/Qwen3-1.7B-Base"
    assert coder.config.training["published"] == {"l0": 5.0}
    assert not caplog.text


def test_k_that_nothing_says(tmp_path):
    with pytest.raises(FormatError) as caught:
        load(folder(tmp_path / "a"))
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: config.json: how many latents a token keeps is not said for layer3.sae.pt: neither as k "
        'here, nor in the path (…-W32K-L0_50/…); fetch the release\'s config.json too, or write {"k": …} into one '
        "beside the file"
    )


def test_a_hook_that_nothing_says(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(folder(tmp_path / "a", config={"k": 5}))
    assert "the hook (taken for resid_post) is not in the file" in caplog.text
    assert coder.config.reads == ("blocks.3.resid_post",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "relu_sae"}, "config.json: model_type is 'relu_sae'. "),
        ({"k": 0}, "k is 0, expected a whole number above 0"),
        ({"k": 21}, "k is 21, larger than n_latents = 20"),
        ({"d_sae": 19}, "W_enc is [20, 6], expected [19, 6]"),
    ],
)
def test_settings_that_cannot_be_kept(tmp_path, changes, message):
    with pytest.raises(FormatError) as caught:
        load(folder(tmp_path / "a", config=config(**changes)))
    assert message in str(caught.value)


def test_a_broken_config(tmp_path):
    place = folder(tmp_path / "a")
    (place / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json is not JSON"):
        load(place)
