"""circuit-tracer's transcoder sets: kinds, both decoder layouts, sets elsewhere, and writing them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, jump, normal, put, run, thresholds, weights
from unmix.coder import CoderConfig, SparseCoder
from unmix.coder.config import BatchTopK, JumpReLU, TopK
from unmix.core.errors import FormatError
from unmix.formats import convert, detect, load, load_all
from unmix.formats.draft import Draft
from unmix.formats.layouts.circuit_tracer import CircuitTracerFormat

CONFIG = {
    "model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "hook_mlp_out", "scan": "me/set",
}  # fmt: skip


def stored(i: int, **extra: Tensor) -> dict[str, Tensor]:
    w = weights(seed=10 * i)
    return w | {"W_enc": w["W_enc"].T} | extra


def folder(path: Path, *layers: dict[str, Tensor], config: dict[str, Any] | None = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    for i, tensors in enumerate(layers or (stored(0), stored(1))):
        put(path / f"layer_{i}.safetensors", tensors)
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def test_relu_set(tmp_path, caplog):
    place = folder(tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coders = load_all(place)
    assert detect(place) == "circuit_tracer" and list(coders) == ["layer_0", "layer_1"]
    w, x = stored(1), inputs()
    codes, recon = run(coders["layer_1"], x)
    expected = (x @ w["W_enc"].T + w["b_enc"]).relu()
    assert close(codes, expected) and close(recon, expected @ w["W_dec"] + w["b_dec"])
    config = coders["layer_1"].config
    assert (config.reads, config.writes) == (("blocks.1.mlp_in",), ("blocks.1.mlp_out_post",))
    assert config.training["circuit_tracer"]["scan"] == "me/set"
    assert not caplog.text
    assert load(place / "layer_1.safetensors").config.reads == ("blocks.1.mlp_in",)


def test_thresholds_and_skips(tmp_path):
    skip = normal(D, D, seed=7)
    w, x = stored(0, W_skip=skip, **{"activation_function.threshold": thresholds()}), inputs()
    codes, recon = run(load_all(folder(tmp_path / "a", w))["layer_0"], x)
    expected = jump(x @ w["W_enc"].T + w["b_enc"], thresholds())
    assert close(codes, expected) and close(recon, expected @ w["W_dec"] + w["b_dec"] + x @ skip.T)


def test_topk_keeps_negative_values(tmp_path):
    w, x = stored(0), inputs()
    w["b_enc"] = w["b_enc"] - 5
    place = folder(tmp_path / "a", w, config=CONFIG | {"activation": "topk", "k": 4})
    codes, _ = run(load(place), x)
    best = (x @ w["W_enc"].T + w["b_enc"]).topk(4)
    assert (best.values < 0).any()
    assert close(codes, torch.zeros_like(codes).scatter(-1, best.indices, best.values))


def test_decoders_of_mid_2025_lie_the_other_way(tmp_path):
    w = stored(0)
    a, b = load(folder(tmp_path / "a", w)), load(folder(tmp_path / "b", w | {"W_dec": w["W_dec"].T}))
    assert torch.equal(a.W_dec, b.W_dec)


def test_a_square_decoder_could_be_either(tmp_path):
    square = {"W_enc": torch.ones(F, F), "W_dec": torch.ones(F, F), "b_enc": torch.ones(F), "b_dec": torch.ones(F)}
    with pytest.raises(
        FormatError, match=r"W_dec is \[20, 20\], which can be \[n_latents, d_out\] or \[d_out, n_latents\]"
    ):
        load(folder(tmp_path / "a", square))


def test_without_a_config(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(folder(tmp_path / "a", config=None), name="layer_0")
    assert "layer_0.safetensors: the hooks of this transcoder is not in the file" in caplog.text
    assert coder.config.reads == ("input",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_kind": "lorsa"}, "config.yaml: model_kind is 'lorsa'. "),
        ({"activation": "gelu"}, "activation is 'gelu'. "),
        ({"activation": "topk"}, "k is missing, expected a whole number above 0"),
        ({"activation": "jumprelu"}, "activation is 'jumprelu', but the files hold no thresholds"),
        ({"feature_input_hook": None}, "feature_input_hook is null, expected a string"),
    ],
)
def test_settings_that_cannot_be_kept(tmp_path, changes, message):
    with pytest.raises(FormatError) as caught:
        load_all(folder(tmp_path / "a", config=CONFIG | changes))
    assert message in str(caught.value)


def test_sets_that_lie_elsewhere_are_listed(tmp_path):
    tmp_path.joinpath("config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"transcoders": ["hf://a/b/c.npz", "hf://a/b/d.npz"]})
    )
    with pytest.raises(FormatError, match=r"load them one by one: hf://a/b/c\.npz, hf://a/b/d\.npz"):
        load_all(tmp_path)


def test_wrong_tensors(tmp_path):
    w = stored(0)
    with pytest.raises(FormatError, match=r"W_dec is \[3, 6\], expected \[20, 6\] \(n_latents=20 from its biases"):
        load_all(folder(tmp_path / "a", w | {"W_dec": torch.ones(3, D)}))
    with pytest.raises(FormatError, match="unknown tensor log_thresholds"):
        load_all(folder(tmp_path / "b", w | {"log_thresholds": torch.ones(F)}))


def coder(layer: int, **fields: Any) -> SparseCoder:
    tree = {"reads": (f"blocks.{layer}.mlp_in",), "writes": (f"blocks.{layer}.mlp_out_post",), "d_in": D,
            "n_latents": F, "activation": JumpReLU(), "pre_bias": "none"} | fields  # fmt: skip
    made = SparseCoder(CoderConfig(**tree)).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(made.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer + i)) * 0.7)
            if name == "threshold":
                parameter.abs_()
        made.W_dec.mul_(torch.linspace(0.3, 2, len(made.W_dec))[:, None])
    return made


def written(folder: Path, *coders: SparseCoder) -> Path:
    folder.mkdir()
    CircuitTracerFormat().write({str(i): Draft.of(c) for i, c in enumerate(coders)}, folder)
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"skip": True, "input_scale": 2.0, "output_scale": 0.5},
        {"gate_space": "decoder_norm", "output_scale": 3.0},
        {"pre_bias": "own"},
        {"activation": TopK(k=3, relu="none")},
        {"activation": BatchTopK(k=3)},
    ],
)
def test_written_sets_compute_the_same(tmp_path, fields):
    coders = [coder(i, **fields) for i in (1, 0)]
    again = load_all(written(tmp_path / "out", *coders))
    assert list(again) == ["layer_0", "layer_1"]
    x = inputs()
    for own in coders:
        found = again[f"layer_{own.config.reads[0].split('.')[1]}"]
        assert close(run(found, x)[0], run(own, x)[0]) and close(run(found, x)[1], run(own, x)[1])
        assert (found.config.reads, found.config.writes) == (own.config.reads, own.config.writes)
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "hook_mlp_out")


def test_there_and_back(tmp_path):
    w = stored(0, W_skip=normal(D, D, seed=7), **{"activation_function.threshold": thresholds()})
    place = folder(tmp_path / "a", w, stored(1))
    assert convert(place, tmp_path / "b", "circuit_tracer") == ["layer_0", "layer_1"]
    for name, found in load_all(tmp_path / "b").items():
        for key, tensor in load(place, name=name).state_dict().items():
            assert torch.equal(tensor, found.state_dict()[key])
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["scan"] == "me/set"


UNWRITABLE = [
    ([{}, {"reads": ("blocks.3.mlp_in",)}], "the layers 0, 3: a set has every layer from 0 on"),
    ([{}, {"reads": ("blocks.1.resid_mid",)}], "layers with different hooks: hook_resid_mid, mlp.hook_in"),
    ([{}, {"n_latents": 7}], "transcoders of different widths in one set"),
    ([{"activation": TopK(k=3)}], "a top-k other than of the largest values, negative ones kept"),
    ([{}, {"activation": TopK(k=3, relu="none")}], "a top-k of its own for each layer"),
    ([{"normalise": {"kind": "layer_norm"}}], "the normalisation 'layer_norm'; it has none"),
    ([{"reads": ("input",)}], "needs a hook of a block, found input"),
]


@pytest.mark.parametrize(("fields", "reason"), UNWRITABLE, ids=[reason[:24] for _, reason in UNWRITABLE])
def test_what_the_layout_has_no_field_for(tmp_path, fields, reason):
    coders = [coder(i, **own) for i, own in enumerate(fields)]
    with pytest.raises(FormatError) as caught:
        written(tmp_path / "out", *coders)
    assert reason in str(caught.value)
