"""SAELens v6, read: its formulas on small weights, its settings, what is refused. Recorded numbers: tests/parity."""

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
from unmix.core.errors import CorruptError, FormatError
from unmix.formats import convert, detect, inspect, load

OUT = 5


def weights(out: int = D, **extra: Tensor) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return {
        "W_enc": normal(D, F), "b_enc": 0.1 * normal(F), "W_dec": normal(F, out), "b_dec": normal(out),
    } | extra  # fmt: skip


def folder(path: Path, tensors: dict[str, Tensor], **cfg: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "sae_weights.safetensors")
    base = {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "architecture": "standard",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "prepend_bos": False, "model_name": "gpt2"},
    }  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(base | cfg))
    return path


def test_standard_by_formula(tmp_path):
    w, x = weights(), inputs()
    coder = load(folder(tmp_path / "a", w))
    acts, recon = run(coder, x)
    expected = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert close(acts, expected)
    assert close(recon, expected @ w["W_dec"] + w["b_dec"])
    config = coder.config
    assert config.reads == config.writes == ("blocks.3.resid_post",)
    assert config.input_policy.bos == "none"
    assert config.training["sae_lens"]["metadata"]["model_name"] == "gpt2"
    assert config.model is not None and config.model.name == "gpt2"
    no_bias = load(folder(tmp_path / "b", w, apply_b_dec_to_input=False))
    assert close(run(no_bias, x)[0], (x @ w["W_enc"] + w["b_enc"]).relu())


def test_missing_apply_b_dec_means_true(tmp_path):
    place = folder(tmp_path / "a", weights())
    cfg = json.loads((place / "cfg.json").read_text())
    del cfg["apply_b_dec_to_input"]
    (place / "cfg.json").write_text(json.dumps(cfg))
    assert load(place).config.pre_bias == "tied"


def test_layer_norm_by_formula(tmp_path):
    w, x = weights(), inputs()
    acts, recon = run(load(folder(tmp_path / "a", w, normalize_activations="layer_norm")), x)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    expected = (((x - mean) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert close(acts, expected)
    assert close(recon, (expected @ w["W_dec"] + w["b_dec"]) * std + mean)


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_by_formula_where_few_are_positive(tmp_path, rescale):
    w, x = weights(), inputs()
    w["b_enc"] -= 6  # most rows now have fewer than k positive pre-activations
    place = folder(tmp_path / "a", w, architecture="topk", k=4, rescale_acts_by_decoder_norm=rescale)
    acts, recon = run(load(place), x)
    hidden = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    norms = w["W_dec"].norm(dim=-1)
    hidden = hidden * norms if rescale else hidden
    best = hidden.topk(4, dim=-1)
    expected = torch.zeros_like(hidden).scatter(-1, best.indices, best.values)
    assert (expected != 0).sum(-1).min() < 4
    assert close(acts, expected)
    assert close(recon, (expected / norms if rescale else expected) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("key", ["threshold", "log_threshold"])
def test_jumprelu_by_formula(tmp_path, key):
    theta = torch.linspace(0.1, 3.0, F)
    w, x = weights(**{key: theta if key == "threshold" else theta.log()}), inputs()
    acts, _ = run(load(folder(tmp_path / "a", w, architecture="jumprelu")), x)
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    expected = torch.where(z > theta, z, 0.0)
    assert 0 < (expected != 0).sum() < (z > 0).sum()
    assert close(acts, expected)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("jump", [True, False])
def test_transcoders_by_formula(tmp_path, skip, jump):
    w = weights(OUT)
    if skip:
        w["W_skip"] = torch.randn(OUT, D, generator=torch.Generator().manual_seed(4))
    if jump:
        w["threshold"] = torch.full((F,), 1.5)
    architecture = ("jumprelu_" if jump else "") + ("skip_" if skip else "") + "transcoder"
    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    coder = load(folder(tmp_path / "a", w, architecture=architecture, d_out=OUT, metadata=metadata))
    x = inputs()
    acts, recon = run(coder, x)
    z = x @ w["W_enc"] + w["b_enc"]  # b_dec is never subtracted, whatever apply_b_dec_to_input says
    expected = torch.where(z > (1.5 if jump else 0.0), z, 0.0)
    assert close(acts, expected)
    assert close(recon, expected @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0.0))
    assert coder.config.reads == ("blocks.1.mlp_in",) and coder.config.writes == ("blocks.1.mlp_out_post",)


def test_gated_by_formula(tmp_path):
    w = weights(b_gate=0.3 * torch.randn(F), b_mag=0.3 * torch.randn(F), r_mag=0.2 * torch.randn(F))
    del w["b_enc"]
    x = inputs()
    acts, recon = run(load(folder(tmp_path / "a", w, architecture="gated")), x)
    s = x - w["b_dec"]
    fires = (s @ w["W_enc"] + w["b_gate"]) > 0
    expected = torch.where(fires, (s @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu(), 0.0)
    assert close(acts, expected) and close(recon, expected @ w["W_dec"] + w["b_dec"])


def test_constant_norm_by_formula(tmp_path):
    w, x = weights(), inputs()
    acts, recon = run(load(folder(tmp_path / "a", w, normalize_activations="constant_norm_rescale")), x)
    factor = D**0.5 / x.norm(dim=-1, keepdim=True)
    expected = ((x * factor - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert close(acts, expected) and close(recon, (expected @ w["W_dec"] + w["b_dec"]) / factor)


def test_abstopk_by_formula(tmp_path):
    w, x = weights(), inputs()
    acts, _ = run(load(folder(tmp_path / "a", w, architecture="abstopk", k=4)), x)
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    expected = torch.zeros_like(z).scatter(-1, (best := z.abs().topk(4).indices), z.gather(-1, best))
    assert (expected < 0).any() and close(acts, expected)


def test_transcoders_are_normalised_on_the_way_in_alone(tmp_path):
    w, x = weights(OUT), inputs()
    cfg = {"architecture": "transcoder", "d_out": OUT, "normalize_activations": "layer_norm"}
    acts, recon = run(load(folder(tmp_path / "a", w, **cfg)), x)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    expected = ((x - mean) / (std + 1e-5) @ w["W_enc"] + w["b_enc"]).relu()
    assert close(acts, expected) and close(recon, expected @ w["W_dec"] + w["b_dec"])
    skip = {**cfg, "architecture": "skip_transcoder"}
    with pytest.raises(FormatError, match="its skip reads the raw input beside an encoder that reads the normalised"):
        load(folder(tmp_path / "b", {**w, "W_skip": torch.ones(OUT, D)}, **skip))


def test_a_matching_pursuit_step_by_hand(tmp_path):
    tensors = {"W_dec": torch.eye(3, D), "b_dec": torch.zeros(D)}
    cfg = {"architecture": "matching_pursuit", "d_sae": 3, "max_iterations": 2, "residual_threshold": 0.0}
    coder = load(folder(tmp_path / "a", tensors, **cfg))
    acts, recon = run(coder, torch.tensor([[1.0, 3.0, 2.0, 9.0, 0.0, 0.0]]))
    assert acts.tolist() == [[0.0, 3.0, 2.0]]  # the two largest; the fourth input no atom can say
    assert recon.tolist() == [[0.0, 3.0, 2.0, 0.0, 0.0, 0.0]]
    with pytest.raises(FormatError, match="normalize_activations is 'covariance_whitening'"):
        load(folder(tmp_path / "b", tensors, **cfg, normalize_activations="covariance_whitening"))


def test_whitening_needs_its_statistics(tmp_path):
    place = folder(tmp_path / "a", weights(), normalize_activations="covariance_whitening")
    with pytest.raises(
        FormatError, match=r"the statistics are not in the folder \(activation_whitening.safetensors is"
    ):
        load(place)
    matrix = torch.diag(torch.linspace(0.5, 2, D)).double()
    mean = torch.linspace(-1, 1, D).double()
    stored = {"mean": mean, "matrix": matrix, "inverse_matrix": matrix.inverse().contiguous()}
    save_file(stored, place / "activation_whitening.safetensors")
    w, x = weights(), inputs()
    acts, recon = run(load(place), x)
    expected = ((((x - mean.float()) @ matrix.float()) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert close(acts, expected)
    assert close(recon, (expected @ w["W_dec"] + w["b_dec"]) @ matrix.float().inverse() + mean.float())


def test_what_lies_beside_the_weights(tmp_path):
    place = folder(tmp_path / "a", weights())
    save_file({"sparsity": torch.linspace(-10, 0, F)}, place / "sparsity.safetensors")
    (place / "runner_cfg.json").write_text('{"lr": 0.5}')
    coder = load(place)
    assert torch.equal(coder.statistics["log_feature_sparsity"], torch.linspace(-10, 0, F))
    assert coder.config.training["sae_lens_runner"] == {"lr": 0.5}
    save_file({"sparsity": torch.zeros(F + 1)}, place / "sparsity.safetensors")
    with pytest.raises(FormatError, match=r"sparsity is \[21\], expected \[20\]"):
        load(place)


def test_generations_are_told_apart(tmp_path):
    place = folder(tmp_path / "a", weights(), hook_name="blocks.1.hook_resid_post", activation_fn="relu")
    assert detect(place) == "sae_lens_legacy"  # keys at the top, and metadata without a version
    newer = {"sae_lens_version": "6.1.0", "hook_name": "blocks.5.hook_resid_pre"}
    folder(tmp_path / "a", weights(), metadata=newer, model_name="gpt2")
    assert detect(place) == "sae_lens"  # a training run's own keys on top
    assert load(place).config.reads == ("blocks.5.resid_pre",)


def test_batchtopk_threshold_and_its_export(tmp_path):
    w, x = weights(topk_threshold=torch.tensor(4.0, dtype=torch.float64)), inputs()
    place = folder(tmp_path / "a", w, architecture="batchtopk", k=3.0, rescale_acts_by_decoder_norm=True)
    coder = load(place)
    acts, recon = run(coder, x)
    norms = w["W_dec"].norm(dim=-1)
    gate = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    expected = torch.where(gate > 4.0, gate, 0.0)
    assert 0 < (expected != 0).sum() < expected.numel() / 2
    assert close(acts, expected) and close(recon, expected / norms @ w["W_dec"] + w["b_dec"])
    convert(place, tmp_path / "b", "sae_lens")
    again = load(tmp_path / "b")
    assert again.config.activation.kind == "jumprelu"
    assert close(run(again, x)[0], acts) and close(run(again, x)[1], recon)


def test_average_norm_checkpoints_need_their_factor(tmp_path):
    w, x = weights(), inputs()
    place = folder(tmp_path / "a", w, normalize_activations="expected_average_only_in")
    with pytest.raises(FormatError, match="the factor is not in the folder"):
        load(place)
    (place / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    acts, recon = run(load(place), x)
    expected = ((x / 2 - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert close(acts, expected) and close(recon, 2 * (expected @ w["W_dec"] + w["b_dec"]))
    convert(place, tmp_path / "b", "sae_lens")  # folded in
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["normalize_activations"] == "none"
    assert close(run(load(tmp_path / "b"), x)[0], acts) and close(run(load(tmp_path / "b"), x)[1], recon)


def test_wrong_tensors_are_named(tmp_path):
    place = tmp_path / "a"
    w = weights()
    folder(place, w | {"W_dec": w["W_dec"].T.contiguous()})
    with pytest.raises(FormatError) as caught:
        load(place)
    assert str(caught.value) == (
        f"{place}: sae_weights.safetensors: W_dec is [6, 20], expected [20, 6] "
        "(d_sae=20 from cfg.json; d_out=6 from cfg.json)"
    )
    folder(place, w | {"extra": torch.ones(1)})
    with pytest.raises(FormatError, match="unknown tensor extra; expected W_enc, b_enc, W_dec, b_dec"):
        load(place)
    del w["b_enc"]
    folder(place, w)
    with pytest.raises(FormatError, match="b_enc is missing; found W_dec, W_enc, b_dec"):
        load(place)
    folder(place, weights() | {"b_enc": torch.zeros(F, dtype=torch.int32)})
    with pytest.raises(FormatError, match="b_enc is int32, expected one of float64, float32"):
        load(place)
    folder(place, weights(), architecture="jumprelu")
    with pytest.raises(FormatError, match="threshold or log_threshold is missing"):
        load(place)


BAD_SETTINGS = [
    ({"architecture": "temporol"}, "architecture is 'temporol'. Did you mean 'temporal'"),
    ({"normalize_activations": "layernorm"}, "normalize_activations is 'layernorm'. Did you mean 'layer_norm'"),
    ({"reshape_activations": "odd"}, "reshape_activations is 'odd'. Allowed: none, hook_z"),
    ({"architecture": "topk"}, "k is missing, expected a whole number above 0"),
    ({"architecture": "topk", "k": 2.5}, "k is 2.5, expected a whole number"),
    ({"architecture": "topk", "k": 99}, "k is 99, larger than n_latents = 20"),
    ({"apply_b_dec_to_input": "yes"}, 'apply_b_dec_to_input is "yes", expected true or false'),
    ({"metadata": ["x"]}, r'metadata is \["x"\], expected an object'),
]


@pytest.mark.parametrize(("cfg", "message"), BAD_SETTINGS)
def test_settings_that_cannot_be_kept(tmp_path, cfg, message):
    with pytest.raises(FormatError, match=message) as caught:
        load(folder(tmp_path / "a", weights(), **cfg))
    assert "cfg.json" in str(caught.value)


def test_unknown_keys_are_said_and_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(folder(tmp_path / "a", weights(), brand_new=3))
    assert "keys kept but not understood: brand_new" in caplog.text
    assert coder.config.training["sae_lens"]["brand_new"] == 3


def test_policy_of_the_metadata(tmp_path):
    metadata = {
        "hook_name": "blocks.5.attn.hook_z", "hook_head_index": 2, "prepend_bos": True, "seqpos_slice": [4, None],
        "exclude_special_tokens": [7, 8],
    }  # fmt: skip
    config = load(folder(tmp_path / "a", weights(), metadata=metadata)).config
    assert config.reads == ("blocks.5.z#2",)
    assert config.input_policy.bos == "context"
    assert config.input_policy.skip_first == 4 and config.input_policy.skip_ids == (7, 8)


def test_half_precision_is_read_as_float32(tmp_path):
    half = {k: v.half() for k, v in weights().items()}
    coder = load(folder(tmp_path / "a", half, dtype="float16"))
    assert coder.dtype == torch.float32
    assert torch.equal(coder.W_dec, half["W_dec"].float())


def test_inspect_opens_what_load_refuses(tmp_path):
    facts = inspect(folder(tmp_path / "a", weights(), architecture="gated"))
    assert facts["formats"] == ["sae_lens"] and facts["loadable"] is False
    assert "unknown tensor b_enc; expected W_enc, b_gate, r_mag, b_mag, W_dec, b_dec" in facts["refused"]
    assert inspect(folder(tmp_path / "b", weights()))["loadable"] is True


def test_a_file_cut_short(tmp_path):
    place = folder(tmp_path / "a", weights())
    file = place / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CorruptError, match=r"sae_weights\.safetensors: cut short: its header claims 256 bytes"):
        load(place)
    assert inspect(place)["loadable"] is False
