"""Gemma Scope: the maths, what the path says and what it does not, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, jump, run, thresholds, weights
from unmix.core.errors import CorruptError, FormatError, NonFiniteError
from unmix.formats import convert, detect, load, load_all
from unmix.formats.layouts.gemma_scope import GemmaScopeFormat, Said
from unmix.formats.place import Place

RES = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


def npz(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (tensors or weights() | {"threshold": thresholds()}) | changes
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in tensors.items()})
    return folder


def expected(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    codes = jump(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    return codes, codes @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_maths_in_either_case(tmp_path, case):
    w, x = weights() | {"threshold": thresholds()}, inputs()
    names = {"W_enc": f"{case('w')}_enc", "W_dec": f"{case('w')}_dec"}
    place = npz(tmp_path / RES, {names.get(k, k): v for k, v in w.items()})
    assert detect(place) == "gemma_scope"
    codes, recon = run(load(place), x)
    assert close(codes, expected(w, x)[0]) and close(recon, expected(w, x)[1])


@pytest.mark.parametrize(
    ("path", "reads", "writes", "model"),
    [
        (RES, "blocks.20.resid_post", "blocks.20.resid_post", "google/gemma-2-2b"),
        (
            "models--google--gemma-scope-9b-it-res/snapshots/ab12/layer_9/width_16k/average_l0_88",
            "blocks.9.resid_post", "blocks.9.resid_post", "google/gemma-2-9b-it",
        ),
        (
            "gemma-scope-27b-pt-mlp/layer_1/width_131k/average_l0_9", "blocks.1.mlp_out_post", "blocks.1.mlp_out_post",
            "google/gemma-2-27b",
        ),
        ("gemma-scope-2b-pt-att/layer_5/width_16k/average_l0_34", "blocks.5.z", "blocks.5.z", "google/gemma-2-2b"),
        (
            "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54", "blocks.3.ln2.hook_normalized",
            "blocks.3.mlp_out_post", "google/gemma-2-2b",
        ),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "embeddings", "embeddings", "google/gemma-2-2b"),
    ],
)  # fmt: skip
def test_hooks_model_and_l0_of_the_path(tmp_path, caplog, path, reads, writes, model):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        config = load(npz(tmp_path / path)).config
    assert (config.reads, config.writes) == ((reads,), (writes,))
    assert config.model is not None and config.model.name == model
    assert config.training["published"] == {"l0": float(path.rsplit("_", 1)[1])}
    assert not caplog.text


def test_a_remote_place_is_read_by_its_address():
    said = Said.by(f"hf://{RES}/params.npz")
    assert said == Said("google/gemma-2-2b", "res", 20, 71.0)
    assert Said.by("release:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical").hooks == (
        "blocks.20.resid_post",
    )


def test_a_release_is_read_by_what_it_stands_for(tmp_path):
    origin = {"repo": "google/gemma-scope-2b-pt-res", "path": "layer_20/width_16k/average_l0_71"}
    place = Place(npz(tmp_path / "a"), "release:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical", origin)
    config = GemmaScopeFormat().read(place).config
    assert config.reads == ("blocks.20.resid_post",) and config.training["published"] == {"l0": 71.0}


def test_embedding_coders_serve_scaled_embeddings(tmp_path):
    w, x = weights() | {"threshold": thresholds()}, inputs()
    coder = load(npz(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", w))
    codes, recon = expected(w, x)
    found = run(coder, x * D**0.5)
    assert close(found[0], codes) and close(found[1], recon * D**0.5)
    # The same as W_enc/√d and W_dec·√d; the bias of the output is scaled too.
    assert "before their factor √d" in coder.config.training["gemma_scope"]["space"]


def test_what_a_lone_file_does_not_say(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        config = load(npz(tmp_path / "a") / "params.npz").config
    assert "params.npz: the site that it reads is not in the file" in caplog.text
    assert config.reads == ("input",) and config.model is None and "published" not in config.training
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="unmix"):
        load(npz(tmp_path / "gemma-scope-2b-pt-res" / "somewhere"))
    assert "the layer that it reads is not in the file" in caplog.text


def test_a_folder_of_many(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-res"
    for layer in (0, 1):
        npz(root / f"layer_{layer}/width_16k/average_l0_{layer + 7}")
    coders = load_all(root)
    assert list(coders) == ["layer_0/width_16k/average_l0_7", "layer_1/width_16k/average_l0_8"]
    assert [c.config.reads[0] for c in coders.values()] == ["blocks.0.resid_post", "blocks.1.resid_post"]


def test_wrong_tensors(tmp_path):
    w = weights() | {"threshold": thresholds()}
    place = npz(tmp_path / "a", w, W_dec=w["W_dec"].T)
    with pytest.raises(FormatError) as caught:
        load(place)
    assert str(caught.value) == (
        f"{place}: params.npz: W_dec is [6, 20], expected [20, 6] (n_latents=20 from W_enc; d_out=6 from b_dec)"
    )
    with pytest.raises(FormatError, match="unknown tensor scaling_factor; expected W_enc, w_enc, b_enc"):
        load(npz(tmp_path / "b", w, scaling_factor=torch.ones(F)))
    with pytest.raises(FormatError, match=r"threshold is \[3\], expected \[20\] \(n_latents=20 from W_enc\)"):
        load(npz(tmp_path / "c", w, threshold=torch.ones(3)))
    with pytest.raises(FormatError, match="W_enc or w_enc are both there, expected one"):
        load(npz(tmp_path / "d", w, w_enc=w["W_enc"]))
    with pytest.raises(NonFiniteError, match=r"params.npz: b_dec holds NaN or infinity"):
        load(npz(tmp_path / "e", w, b_dec=torch.full((D,), float("nan"))))


def test_files_that_are_another_thing(tmp_path):
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "params.npz", W_enc=np.ones((2, 3)))
    with pytest.raises(FormatError, match="no known format"):
        load(tmp_path / "a")
    place = npz(tmp_path / "b")
    data = (place / "params.npz").read_bytes()
    (place / "params.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises((FormatError, CorruptError), match=r"params\.npz"):
        load(place)


def test_it_is_read_only(tmp_path):
    place = npz(tmp_path / "a")
    with pytest.raises(FormatError, match="'gemma_scope' can be read but not written"):
        convert(place, tmp_path / "b", "gemma_scope")
