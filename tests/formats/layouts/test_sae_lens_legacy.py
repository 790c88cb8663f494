"""SAELens before version 6: its formulas on small weights, its settings, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.writing import D, F, close, inputs, run
from unmix.core.errors import FormatError
from unmix.formats import convert, detect, load

V5: dict[str, Any] = {
    "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small",
    "hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3, "hook_head_index": None, "activation_fn_str": "relu",
    "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
    "sae_lens_training_version": "5.0.0", "prepend_bos": True, "dataset_path": "some/dataset", "context_size": 64,
    "normalize_activations": "none", "neuronpedia_id": None,
}  # fmt: skip
V2: dict[str, Any] = {
    "model_name": "gelu-2l", "hook_point": "blocks.{layer}.hook_mlp_out", "hook_point_layer": 1,
    "hook_point_head_index": None, "d_in": D, "d_sae": F, "activation_fn": "relu", "dtype": "torch.float32",
    "normalize_activations": False, "lr": 4e-4, "noise_scale": 0.1, "wandb_project": "p",
}  # fmt: skip


def weights() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def folder(path: Path, cfg: dict[str, Any], **extra: Tensor) -> Path:
    path.mkdir(exist_ok=True)
    save_file(weights() | extra, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


def hidden(x: Tensor, subtracted: bool = True) -> Tensor:
    w = weights()
    return (x - w["b_dec"] * subtracted) @ w["W_enc"] + w["b_enc"]


def test_versions_3_to_5(tmp_path):
    coder, x = load(folder(tmp_path / "a", V5)), inputs()
    assert detect(tmp_path / "a") == "sae_lens_legacy"
    acts, recon = run(coder, x)
    assert close(acts, hidden(x).relu())
    assert close(recon, hidden(x).relu() @ weights()["W_dec"] + weights()["b_dec"])
    config = coder.config
    assert config.reads == config.writes == ("blocks.3.resid_pre",)
    assert config.model is not None and config.model.name == "gpt2-small"
    assert config.training["sae_lens_legacy"] == V5
    assert (config.training["context_size"], config.training["dataset"]) == (64, "some/dataset")


def test_versions_before_3(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder, x = load(folder(tmp_path / "a", V2)), inputs()
    assert "not understood" not in caplog.text
    assert close(run(coder, x)[0], hidden(x).relu())  # b_dec is subtracted where nothing is said, and no noise is added
    assert coder.config.reads == ("blocks.1.mlp_out_post",)
    assert coder.config.input_policy.bos == "context"
    assert coder.config.training["sae_lens_legacy"] == V2
    half = {k: v for k, v in V2.items() if k != "d_sae"} | {"expansion_factor": 2, "apply_b_dec_to_input": False}
    with pytest.raises(FormatError, match=r"W_enc is \[6, 20\], expected \[6, 12\]"):
        load(folder(tmp_path / "b", half))


def test_topk_is_said_by_the_activation(tmp_path):
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    coder, x = load(folder(tmp_path / "a", V5 | topk)), inputs()
    best = hidden(x).topk(4)
    assert close(run(coder, x)[0], torch.zeros(len(x), F).scatter(-1, best.indices, best.values.relu()))
    with pytest.raises(FormatError, match=r"activation_fn_kwargs.k is missing, expected a whole number"):
        load(folder(tmp_path / "b", V5 | {"activation_fn_str": "topk"}))
    with pytest.raises(FormatError, match="architecture is 'topk', but activation_fn_str is 'relu'"):
        load(folder(tmp_path / "c", V5 | {"architecture": "topk"}))


@pytest.mark.parametrize("key", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_finetuned_factor_goes_into_the_decoder(tmp_path, key):
    factor, x = torch.linspace(0.5, 2, F), inputs()
    w = weights()
    acts, recon = run(load(folder(tmp_path / "a", V5 | {"finetuning_scaling_factor": True}, **{key: factor})), x)
    assert close(acts, hidden(x).relu()) and close(recon, (acts * factor) @ w["W_dec"] + w["b_dec"])
    with pytest.raises(FormatError, match="finetuning_scaling_factor is false, but the weights hold a factor"):
        load(folder(tmp_path / "b", V5, **{key: factor}))
    assert close(run(load(folder(tmp_path / "c", V5, **{key: torch.ones(F)})), x)[1], acts @ w["W_dec"] + w["b_dec"])
    # Before version 3 there was no switch: the factor was always used.
    acts, recon = run(load(folder(tmp_path / "d", V2, **{key: factor})), x)
    assert close(recon, (acts * factor) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("said", [True, "expected_average_only_in"])
def test_the_average_norm_needs_its_factor(tmp_path, said):
    place, x = folder(tmp_path / "a", V5 | {"normalize_activations": said}), inputs()
    with pytest.raises(FormatError, match=r"the factor is not in the folder \(activation_scaler.json is missing\)"):
        load(place)
    save_file({"estimated_norm_scaling_factor": torch.tensor(0.5)}, place / "activations_store_state.safetensors")
    acts, recon = run(load(place), x)
    assert close(acts, hidden(x / 2).relu())
    assert close(recon, 2 * (acts @ weights()["W_dec"] + weights()["b_dec"]))
    save_file({"estimated_norm_scaling_factor": torch.tensor(0.0)}, place / "activations_store_state.safetensors")
    with pytest.raises(FormatError, match=r"estimated_norm_scaling_factor is 0.0, expected a number above 0"):
        load(place)


REFUSED = [
    ({"activation_fn_str": "tanh-relu"}, r"codes of tanh\(relu\(z\)\) are not supported"),
    ({"architecture": "gatd"}, "architecture is 'gatd'. Did you mean 'gated'"),
    ({"normalize_activations": "layernorm"}, "Did you mean 'layer_norm'"),
    ({"d_in": 7.5}, "d_in is 7.5, expected a whole number above 0"),
    ({"architecture": "jumprelu"}, "threshold or log_threshold is missing"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_refused(tmp_path, change, message):
    with pytest.raises(FormatError, match=message) as caught:
        load(folder(tmp_path / "a", V5 | change))
    assert str(tmp_path) in str(caught.value)


def test_old_folders_become_new_ones(tmp_path):
    factor, x = torch.linspace(0.5, 2, F), inputs()
    old = folder(tmp_path / "a", V5 | {"finetuning_scaling_factor": True}, scaling_factor=factor)
    save_file({"sparsity": torch.linspace(-9, 0, F)}, old / "sparsity.safetensors")
    convert(old, tmp_path / "b", "sae_lens")
    assert detect(tmp_path / "b") == "sae_lens"
    for a, b in zip(run(load(old), x), run(load(tmp_path / "b"), x), strict=True):
        assert close(b, a)
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == "gpt2-small" and metadata["context_size"] == 64
    assert metadata["sae_lens_training_version"] == "5.0.0" and metadata["dataset_path"] == "some/dataset"
    assert torch.equal(load(tmp_path / "b").statistics["log_feature_sparsity"], torch.linspace(-9, 0, F))
    with pytest.raises(FormatError, match="'sae_lens_legacy' can be read but not written"):
        convert(old, tmp_path / "c", "sae_lens_legacy")
