"""SAELens v6: recorded outputs of the peer, its formulas on small weights, both ways, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmix.coder.config import BatchTopK, CoderConfig, Identity, JumpReLU, Normalise, ReLU, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import CorruptError, FormatError, NonFiniteError
from unmix.formats import convert, inspect, load
from unmix.formats.sae_lens import SaeLensFormat

D, F, OUT = 6, 20, 5


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


def inputs(n: int = 16) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(9)) * 2


@torch.no_grad()
def run(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    codes = coder.encode(x)
    return codes.dense(), coder.decode(codes)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


PARITY = [
    "standard_inference", "standard_layer_norm", "topk_inference", "jumprelu_inference", "transcoder",
    "batchtopk_training",
]  # fmt: skip


@pytest.mark.parametrize("kind", PARITY)
def test_recorded_codes_and_reconstructions(shared, kind):
    place = shared / "parity" / "sae_lens" / kind
    expected = load_file(place / "expected.safetensors")
    # The recorded batchtopk codes were selected over the batch, as in training.
    coder = load(place).train(kind == "batchtopk_training")
    acts, recon = run(coder, expected["x"])
    assert close(acts, expected["acts"])
    assert close(recon, expected["recon"])


def test_recorded_gated_is_refused(shared):
    with pytest.raises(FormatError, match="architecture 'gated' is not supported yet; supported: standard, topk"):
        load(shared / "parity" / "sae_lens" / "gated_inference")


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


COMMON: dict[str, Any] = {"reads": ("blocks.2.z#1",), "d_in": D, "n_latents": F}
WRITABLE = [
    CoderConfig(**COMMON, activation=ReLU()),
    CoderConfig(**COMMON, activation=ReLU(), pre_bias="own"),
    CoderConfig(**COMMON, activation=ReLU(), pre_bias="none", input_scale=0.7, output_scale=1.3),
    CoderConfig(**COMMON, activation=JumpReLU(), normalise=Normalise(kind="layer_norm")),
    CoderConfig(**COMMON, activation=TopK(k=3), input_scale=2.0, output_scale=0.5),
    CoderConfig(**COMMON, activation=TopK(k=3), gate_space="decoder_norm"),
    CoderConfig(
        **COMMON, activation=JumpReLU(), writes=("blocks.2.attn_out",), d_out=OUT, pre_bias="none", skip=True,
        input_scale=2.0, output_scale=0.5,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", WRITABLE, ids=range(len(WRITABLE)))
def test_written_coders_compute_the_same(tmp_path, config):
    coder = SparseCoder(config, seed=2).eval()
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng).abs() * 0.7 - 0.2)
        coder.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
    SaeLensFormat().write(coder, tmp_path / "out")
    again = load(tmp_path / "out")
    x = inputs()
    assert close(run(again, x)[1], run(coder, x)[1])
    codes = run(coder, x)[0]
    if config.gate_space == "decoder_norm":
        codes = codes * coder.W_dec.detach().norm(dim=-1)
    assert close(run(again, x)[0], codes)
    assert (again.config.reads, again.config.writes) == (config.reads, config.writes)
    assert again.config.input_policy.skip_first == 1


UNWRITABLE = [
    (CoderConfig(**COMMON, activation=TopK(k=2, relu="none", magnitude=True)), "signed codes"),
    (CoderConfig(**COMMON | {"n_latents": D}, activation=Identity()), "activation 'identity'"),
    (CoderConfig(**COMMON, activation=BatchTopK(k=2)), "never calibrated"),
    (CoderConfig(**COMMON, activation=ReLU(), normalise=Normalise(kind="layer_norm", ddof=0)), "ddof=0"),
    (CoderConfig(**COMMON, activation=TopK(k=2), writes=("b",), pre_bias="none"), "a top-k transcoder"),
    (CoderConfig(**COMMON | {"reads": ("a", "b")}, activation=ReLU()), "2 reads and 2 writes"),
]


@pytest.mark.parametrize(("config", "reason"), UNWRITABLE, ids=[reason for _, reason in UNWRITABLE])
def test_what_the_layout_has_no_field_for(tmp_path, config, reason):
    with pytest.raises(FormatError, match=f"the sae_lens format cannot express .*{reason}"):
        SaeLensFormat().write(SparseCoder(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_non_finite_is_written_or_read(tmp_path):
    coder = SparseCoder(WRITABLE[0])
    with torch.no_grad():
        coder.b_enc[3] = float("nan")
    with pytest.raises(NonFiniteError, match="b_enc holds NaN or infinity; nothing was written"):
        SaeLensFormat().write(coder, tmp_path / "out")
    w = weights()
    w["W_dec"][2, 1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"sae_weights.safetensors: W_dec holds NaN or infinity"):
        load(folder(tmp_path / "a", w))


def test_wrong_tensors_are_named(tmp_path):
    place = tmp_path / "a"
    w = weights()
    folder(place, w | {"W_dec": w["W_dec"].T.contiguous()})
    with pytest.raises(FormatError) as caught:
        load(place)
    assert str(caught.value) == (
        f"{place}: sae_weights.safetensors: W_dec is [6, 20], expected [20, 6] (d_sae=20, d_out=6 from cfg.json)"
    )
    folder(place, w | {"extra": torch.ones(1)})
    with pytest.raises(FormatError, match="unknown tensor extra; expected W_enc, b_enc, W_dec, b_dec"):
        load(place)
    del w["b_enc"]
    folder(place, w)
    with pytest.raises(FormatError, match="b_enc is missing; found W_dec, W_enc, b_dec"):
        load(place)
    folder(place, weights() | {"b_enc": torch.zeros(F, dtype=torch.int32)})
    with pytest.raises(FormatError, match="b_enc is I32, expected one of F64, F32, F16, BF16"):
        load(place)
    folder(place, weights(), architecture="jumprelu")
    with pytest.raises(FormatError, match="threshold or log_threshold is missing"):
        load(place)


BAD_SETTINGS = [
    ({"architecture": "temporal"}, "architecture 'temporal' is not supported yet"),
    ({"activation_fn_str": "relu"}, "a layout of SAELens before version 6"),
    ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' is not supported yet"),
    ({"reshape_activations": "odd"}, "reshape_activations is 'odd'; supported: none, hook_z"),
    ({"architecture": "topk"}, "k is null, expected a whole number above 0"),
    ({"architecture": "topk", "k": 2.5}, "k is 2.5, expected a whole number"),
    ({"architecture": "topk", "k": 99}, "k is 99, larger than n_latents = 20"),
    ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes', expected true or false"),
    ({"metadata": ["x"]}, "metadata is a list, expected an object"),
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
    assert "architecture 'gated' is not supported yet" in facts["refused"]
    assert facts["settings"]["cfg.json"]["architecture"] == "gated"
    assert facts["tensors"]["sae_weights.safetensors"]["W_enc"] == {"shape": [D, F], "dtype": "F32"}
    good = inspect(folder(tmp_path / "b", weights()))
    assert good["loadable"] is True and good["coder"]["n_latents"] == F
    assert good["health"]["zero_decoder_rows"] == 0
    json.dumps([facts, good])


def test_a_file_cut_short(tmp_path):
    place = folder(tmp_path / "a", weights())
    file = place / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CorruptError, match=r"sae_weights\.safetensors cannot be read"):
        load(place)
    assert inspect(place)["loadable"] is False
