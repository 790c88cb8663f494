"""SAELens v6, written: the same function read again, what is folded, and what is refused."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.writing import D, F, close, inputs, make, run
from unmix.coder.config import (
    BatchTopK,
    Gated,
    GroupMax,
    Identity,
    JumpReLU,
    MatchingPursuit,
    Normalise,
    ReLU,
    Temporal,
    TopK,
)
from unmix.core.errors import FormatError, NonFiniteError
from unmix.formats import convert, load

OUT = 5
NONE: dict[str, Any] = {"pre_bias": "none"}
OWN: dict[str, Any] = {"pre_bias": "own"}
SCALED: dict[str, Any] = {"input_scale": 0.7, "output_scale": 1.3}
ELSEWHERE: dict[str, Any] = {"writes": ("blocks.2.attn_out",), "d_out": OUT, "pre_bias": "none"}
LAYERED = Normalise(kind="layer_norm")
CONSTANT = Normalise(kind="constant_norm")
FIXED = Normalise(kind="standardise")

SAME_CODES = [
    (ReLU(), {}, "standard"),
    (ReLU(), OWN, "standard"),
    (ReLU(), {**NONE, **SCALED}, "standard"),
    (ReLU(), {"normalise": CONSTANT}, "standard"),
    (ReLU(), {"normalise": FIXED, **SCALED}, "standard"),
    (JumpReLU(), {"normalise": LAYERED, **SCALED}, "jumprelu"),
    (JumpReLU(), {"gate_space": "decoder_norm"}, "jumprelu"),
    (JumpReLU(), {"gate_space": "own", **SCALED}, "jumprelu"),
    (BatchTopK(k=3), {"gate_space": "decoder_norm"}, "jumprelu"),
    (Gated(), {**OWN, **SCALED}, "gated"),
    (Gated(), {"normalise": FIXED}, "gated"),
    (TopK(k=3), {"input_scale": 2.0, "output_scale": 0.5}, "topk"),
    (TopK(k=3, relu="none", magnitude=True), OWN, "abstopk"),
    (ReLU(), {**ELSEWHERE, "pre_bias": "own"}, "transcoder"),
    (ReLU(), {**ELSEWHERE, "normalise": LAYERED.model_copy(update={"restore": False})}, "transcoder"),
    (JumpReLU(), {**ELSEWHERE, **SCALED, "skip": True}, "jumprelu_skip_transcoder"),
    (ReLU(), {"skip": True}, "skip_transcoder"),
]


@pytest.mark.parametrize(("activation", "fields", "architecture"), SAME_CODES)
def test_written_coders_compute_the_same(tmp_path, activation, fields, architecture):
    coder, x = make(activation, **fields), inputs()
    convert(coder, tmp_path / "out", "sae_lens")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["architecture"] == architecture
    assert cfg["metadata"]["sae_lens_version"].startswith("6.")
    again = load(tmp_path / "out")
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])
    assert (again.config.reads, again.config.writes) == (coder.config.reads, coder.config.writes)
    assert again.config.input_policy.skip_first == 1
    convert(again, tmp_path / "twice", "sae_lens")
    assert json.loads((tmp_path / "twice" / "cfg.json").read_text()) == cfg


@pytest.mark.parametrize("space", ["decoder_norm", "own"])
def test_a_factor_that_ranks_latents_goes_into_the_codes(tmp_path, space, caplog):
    coder, x = make(TopK(k=3), gate_space=space), inputs()
    with caplog.at_level(logging.INFO, logger="unmix"):
        convert(coder, tmp_path / "out", "sae_lens")
    assert "the written codes are that product" in caplog.text
    acts, recon = run(load(tmp_path / "out"), x)
    factor = coder.gate_factor()
    assert factor is not None
    assert close(recon, run(coder, x)[1]) and close(acts, run(coder, x)[0] * factor)


def pursuit(**fields: Any) -> Any:
    """A coder whose encoder is its decoder, with atoms short enough for its steps to converge."""
    coder = make(MatchingPursuit(residual_threshold=0.5), **fields)
    with torch.no_grad():
        coder.W_dec.copy_(coder.dictionary)
        coder.W_enc.copy_(coder.W_dec)
        coder.b_enc.zero_()
    return coder


def test_matching_pursuit_and_its_scale(tmp_path):
    x = inputs()
    for name, fields in (("plain", {}), ("scaled", {"input_scale": 0.5, "output_scale": 2.0})):
        coder = pursuit(**fields)
        convert(coder, tmp_path / name, "sae_lens")
        acts, recon = run(load(tmp_path / name), x)
        assert close(recon, run(coder, x)[1])
        assert close(acts, run(coder, x)[0] / coder.config.input_scale)
    cfg = json.loads((tmp_path / "scaled" / "cfg.json").read_text())
    assert cfg["residual_threshold"] == 1.0 and "W_enc" not in load_file(
        tmp_path / "scaled" / "sae_weights.safetensors"
    )


def temporal(tied: bool, z_scale: float = 1 / (4 * D), **fields: Any) -> Any:
    """A temporal coder without an encoder bias, which SAELens has not."""
    coder = make(Temporal(k=3, n_heads=2, bottleneck=2, z_scale=z_scale), **fields)
    with torch.no_grad():
        coder.b_enc.zero_()
        if tied:
            coder.W_enc.copy_(coder.W_dec)
    return coder


TEMPORAL = [
    ({"tied": True}, True),
    ({"tied": False}, False),
    ({"tied": True, "pre_bias": "none"}, False),  # tied, SAELens would leave b_dec out
    ({"tied": True, "z_scale": 0.3}, False),
    ({"tied": False, "input_scale": 0.5, "output_scale": 2.0}, False),
]


@pytest.mark.parametrize(("said", "tied"), TEMPORAL)
def test_temporal_coders_tied_and_untied(tmp_path, said, tied):
    coder, x = temporal(**said), inputs().view(2, 8, D)
    convert(coder, tmp_path / "out", "sae_lens")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["tied_weights"] is tied and cfg["kval_topk"] == 3
    assert ("W_enc" in load_file(tmp_path / "out" / "sae_weights.safetensors")) is not tied
    again = load(tmp_path / "out")
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])
    scaled = "input_scale" in said
    assert cfg["normalize_activations"] == ("constant_scalar_rescale" if scaled else "none")
    assert cfg["activation_normalization_factor"] == (0.5 if scaled else 1.0)


UNWRITABLE = [
    (TopK(k=2, relu="none"), {}, "signed codes that are not selected by magnitude"),
    (Identity(), {"n_latents": D}, "activation 'identity'; it has relu, topk"),
    (GroupMax(k=2), {}, "activation 'groupmax'"),
    (JumpReLU(keep_max=True), {}, "keeps the largest of a token"),
    (ReLU(), {"normalise": Normalise(kind="layer_norm", ddof=0)}, "ddof=0"),
    (ReLU(), {"normalise": Normalise(kind="layer_norm", restore=False)}, "restore=False"),
    (ReLU(), {**ELSEWHERE, "normalise": LAYERED.model_copy(update={"restore": False}), "skip": True}, "raw input"),
    (TopK(k=2), ELSEWHERE, "a transcoder with activation 'topk'"),
    (Gated(), ELSEWHERE, "a transcoder with activation 'gated'"),
    (ReLU(), {"reads": ("a", "b")}, "2 reads and 2 writes"),
    (MatchingPursuit(), {}, "an encoder bias in matching_pursuit"),
]


@pytest.mark.parametrize(("activation", "fields", "reason"), UNWRITABLE)
def test_what_the_layout_has_no_field_for(tmp_path, activation, fields, reason):
    with pytest.raises(FormatError, match=f"the sae_lens format cannot express .*{reason}"):
        convert(make(activation, **fields), tmp_path / "out", "sae_lens")
    assert not (tmp_path / "out").exists()


def test_what_matching_pursuit_cannot_take(tmp_path):
    refused = {
        "a fixed standardisation": pursuit(normalise=FIXED),
        "a gate on z": pursuit(gate_space="decoder_norm"),
        "an input bias of its own": pursuit(pre_bias="own"),
        "input_scale 2.0 beside output_scale 1.0": pursuit(input_scale=2.0),
        "a decoder bias that is not subtracted": pursuit(pre_bias="none"),
        "whose encoder is not its decoder": pursuit(),
    }
    with torch.no_grad():
        refused["whose encoder is not its decoder"].W_enc.mul_(2)
    for reason, coder in refused.items():
        with pytest.raises(FormatError, match=reason):
            convert(coder, tmp_path / "out", "sae_lens")


def test_what_temporal_cannot_take(tmp_path):
    scaled = {"input_scale": 0.5, "output_scale": 2.0, "normalise": LAYERED}
    with pytest.raises(FormatError, match=r"input_scale 0\.5 after layer_norm in temporal"):
        convert(temporal(tied=False, **scaled), tmp_path / "out", "sae_lens")
    with pytest.raises(FormatError, match="an encoder bias in temporal"):
        convert(make(Temporal(n_heads=2, bottleneck=2, z_scale=1.0)), tmp_path / "out", "sae_lens")
    odd = make(Temporal(n_heads=2, bottleneck=2, z_scale=1.0, eps=1e-3))
    with torch.no_grad():
        odd.b_enc.zero_()
    with pytest.raises(FormatError, match=r"temporal with eps=0.001"):
        convert(odd, tmp_path / "out", "sae_lens")


def test_a_threshold_that_was_never_calibrated(tmp_path):
    coder = make(BatchTopK(k=2))
    with torch.no_grad():
        coder.threshold.fill_(-1)
    with pytest.raises(FormatError, match="never calibrated"):
        convert(coder, tmp_path / "out", "sae_lens")


def test_nothing_non_finite_is_written(tmp_path):
    coder = make(ReLU())
    with torch.no_grad():
        coder.b_enc[3] = float("nan")
    with pytest.raises(NonFiniteError, match="b_enc holds NaN or infinity; nothing was written"):
        convert(coder, tmp_path / "out", "sae_lens")
    assert not (tmp_path / "out").exists()


def test_what_the_files_said_is_written_back(tmp_path):
    convert(make(TopK(k=3), reads=("blocks.2.z#1",)), tmp_path / "a", "sae_lens")
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    cfg |= {"brand_new": 3, "aux_loss_coefficient": 0.5}
    cfg["metadata"] |= {"neuronpedia_id": "x/y", "seqpos_slice": [2, 40], "context_size": 128, "l0": 31.5}
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(cfg))
    (tmp_path / "a" / "runner_cfg.json").write_text('{"lr": 0.5}')
    save_file({"sparsity": torch.linspace(-10, 0, F)}, tmp_path / "a" / "sparsity.safetensors")
    convert(tmp_path / "a", tmp_path / "b", "sae_lens")
    assert json.loads((tmp_path / "b" / "cfg.json").read_text()) == cfg
    assert cfg["metadata"]["hook_name"] == "blocks.2.attn.hook_z" and cfg["metadata"]["hook_head_index"] == 1
    assert json.loads((tmp_path / "b" / "runner_cfg.json").read_text()) == {"lr": 0.5}
    for file in ("sae_weights.safetensors", "sparsity.safetensors"):
        first, second = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_statistics_of_other_formats_are_named(tmp_path, caplog):
    coder = make(ReLU())
    coder.statistics = {"latents_mean_square": torch.ones(F)}
    with caplog.at_level(logging.INFO, logger="unmix"):
        convert(coder, tmp_path / "out", "sae_lens")
    assert "no file for the statistics latents_mean_square" in caplog.text
    assert not (tmp_path / "out" / "sparsity.safetensors").exists()


def test_all_heads_of_z_are_reshaped_by_the_peer(tmp_path):
    for hook, reshape in (("blocks.2.z", "hook_z"), ("blocks.2.z#0", "none"), ("blocks.2.mlp_out", "none")):
        convert(make(ReLU(), reads=(hook,)), tmp_path / hook, "sae_lens")
        assert json.loads((tmp_path / hook / "cfg.json").read_text())["reshape_activations"] == reshape
