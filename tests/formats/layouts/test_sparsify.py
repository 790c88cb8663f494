"""sparsify: its formulas on small weights, its configs of every age, both ways, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.writing import D, F, close, inputs, make, run
from unmix.coder.config import GroupMax, Normalise, ReLU, TopK
from unmix.core.errors import FormatError
from unmix.formats import convert, load, load_all

NEW = {
    "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": 4,
    "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
}  # fmt: skip


def weights(**more: Tensor) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return {
        "encoder.weight": normal(F, D), "encoder.bias": normal(F) - 2, "W_dec": normal(F, D), "b_dec": normal(D),
    } | more  # fmt: skip


def saved(folder: Path, tensors: dict[str, Tensor], cfg: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(NEW if cfg is None else cfg))
    return folder


def pre(w: dict[str, Tensor], s: Tensor) -> Tensor:
    return s @ w["encoder.weight"].T + w["encoder.bias"]


def best(z: Tensor, by: Tensor, k: int = 4) -> Tensor:
    return torch.zeros_like(z).scatter(-1, ids := by.topk(k, dim=-1).indices, z.gather(-1, ids))


@pytest.mark.parametrize("multi", [True, False])
def test_topk_by_formula(tmp_path, multi):
    w, x = weights(), inputs()
    coder = load(saved(tmp_path / "layers.10", w, NEW | {"multi_topk": multi}))
    acts, recon = run(coder, x)
    z = pre(w, x - w["b_dec"]).relu()
    assert ((z > 0).sum(-1) < 4).any()
    assert close(acts, best(z, z)) and close(recon, best(z, z) @ w["W_dec"] + w["b_dec"])
    assert coder.config.reads == coder.config.writes == ("blocks.10.resid_post",)
    assert coder.config.training["sparsify"]["normalize_decoder"] is True


def test_signed_by_formula(tmp_path):
    legacy = {"expansion_factor": 4, "normalize_decoder": True, "k": 4, "signed": True, "d_in": 5}
    w = {k: v[..., :5] if v.shape[-1] == D else v for k, v in weights().items()}
    w["encoder.weight"] = w["encoder.weight"].contiguous()
    w["W_dec"] = w["W_dec"].contiguous()
    x = inputs(d=5)
    acts, recon = run(load(saved(tmp_path / "layer_3", w, legacy)), x)
    z = pre(w, x - w["b_dec"])
    expected = best(z, z.abs())
    assert (expected < 0).any()
    assert close(acts, expected) and close(recon, expected @ w["W_dec"] + w["b_dec"])


def test_groupmax_by_formula(tmp_path):
    w, x = weights(), inputs()
    acts, _ = run(load(saved(tmp_path / "h.6", w, NEW | {"activation": "groupmax"})), x)
    z = pre(w, x - w["b_dec"]).relu().unflatten(-1, (4, -1))
    assert close(acts, torch.where(z == z.amax(-1, keepdim=True), z, 0.0).flatten(-2))


@pytest.mark.parametrize("skip", [True, False])
def test_transcoders_by_formula(tmp_path, skip):
    w, x = weights(), inputs()
    if skip:
        w["W_skip"] = torch.randn(D, D, generator=torch.Generator().manual_seed(4))
    coder = load(saved(tmp_path / "layers.29.mlp" / "seed3", w, NEW | {"transcode": True, "skip_connection": skip}))
    acts, recon = run(coder, x)
    z = pre(w, x).relu()
    expected = best(z, z)
    assert close(acts, expected)
    assert close(recon, expected @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0.0))
    assert coder.config.reads == ("blocks.29.mlp_in",) and coder.config.writes == ("blocks.29.mlp_out",)


def test_several_hookpoints_and_folders_without_one(tmp_path):
    for name in ("layers.3", "layers.4.mlp", "embed_tokens", "mine"):
        saved(tmp_path / "run" / name, weights())
    coders = load_all(tmp_path / "run")
    assert {name: coder.config.reads[0] for name, coder in coders.items()} == {
        "embed_tokens": "embeddings", "layers.3": "blocks.3.resid_post", "layers.4.mlp": "blocks.4.mlp_out",
        "mine": "input",
    }  # fmt: skip
    assert coders["mine"].name == "mine"


BAD = [
    ({"activation": "relu"}, r"cfg\.json: activation is 'relu'"),
    ({"k": 0}, "k is 0, expected a whole number above 0"),
    ({"k": 99}, "k is 99, larger than n_latents = 20"),
    ({"activation": "groupmax", "k": 3}, "n_latents = 20 cannot be cut into k = 3 equal groups"),
    ({"transcode": "yes"}, 'transcode is "yes", expected true or false'),
    ({"num_latents": 19}, r"encoder.weight is \[20, 6\], expected \[19, 6\]"),
    ({"num_latents": 0}, r"encoder.weight is \[20, 6\], expected \[192, 6\]"),
    ({"skip_connection": True}, "W_skip is missing"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_settings_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        load(saved(tmp_path / "layers.1", weights(), NEW | change))


def test_tensors_that_do_not_fit(tmp_path):
    with pytest.raises(FormatError, match="unknown tensor W_skip"):
        load(saved(tmp_path / "a", weights(W_skip=torch.ones(D, D))))
    with pytest.raises(FormatError, match=r"W_dec is \[6, 20\], expected \[20, 6\]"):
        load(saved(tmp_path / "b", weights(W_dec=torch.ones(D, F))))


def test_unknown_keys_are_said_and_kept(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(saved(tmp_path / "layers.1", weights(), NEW | {"brand_new": 3}))
    assert "keys kept but not understood: brand_new" in caplog.text
    assert coder.config.training["sparsify"]["brand_new"] == 3


def test_bare_weights_may_be_opensaes_too(tmp_path):
    place = saved(tmp_path / "layers.1", weights())
    (place / "cfg.json").unlink()
    with pytest.raises(FormatError, match="may be sparsify, opensae; choose with format='sparsify'"):
        load(place / "sae.safetensors")
    with pytest.raises(FormatError, match=r"sae\.safetensors holds sparsify's tensors, but cfg\.json is missing"):
        load(place / "sae.safetensors", format="sparsify")


WRITABLE = [
    make(TopK(k=3)),
    make(TopK(k=3, relu="before"), pre_bias="own", input_scale=0.7, output_scale=1.3),
    make(TopK(k=3), pre_bias="none", normalise=Normalise(kind="standardise")),
    make(TopK(k=3), skip=True, input_scale=2.0),
    make(GroupMax(k=4)),
    make(TopK(k=3, relu="none", magnitude=True)),
    make(TopK(k=3), pre_bias="own", writes=("blocks.2.mlp_out",), skip=True, output_scale=0.5),
]


@pytest.mark.parametrize("coder", WRITABLE, ids=range(len(WRITABLE)))
def test_written_coders_compute_the_same(tmp_path, coder):
    convert(coder, tmp_path / "out", "sparsify")
    again = load(tmp_path / "out")
    x = inputs()
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])
    assert (again.config.reads, again.config.writes) == (coder.config.reads, coder.config.writes)


def test_signed_coders_are_written_for_the_sparsify_that_reads_them(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        convert(make(TopK(k=3, relu="none", magnitude=True)), tmp_path / "out", "sparsify")
    assert "later ones cut them at 0" in caplog.text
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg == {
        "expansion_factor": 3, "normalize_decoder": False, "k": 3, "d_in": D, "signed": True, "num_latents": F,
    }  # fmt: skip


def test_a_gate_on_norms_moves_into_the_codes(tmp_path):
    coder = make(TopK(k=3), gate_space="own")
    convert(coder, tmp_path / "out", "sparsify")
    x, again = inputs(), load(tmp_path / "out")
    assert close(run(again, x)[1], run(coder, x)[1])
    assert close(run(again, x)[0], run(coder, x)[0] * coder.gate_scale.detach())


REFUSED = [
    (make(ReLU()), "the activation 'relu'; it has topk, groupmax"),
    (make(TopK(k=2, relu="none")), "signed codes that are not selected by magnitude"),
    (make(TopK(k=2), normalise=Normalise(kind="layer_norm")), "the normalisation 'layer_norm'"),
    (make(TopK(k=2), writes=("b",), d_out=4, pre_bias="none"), "d_out = 4 beside d_in = 6"),
    (make(TopK(k=2), reads=("a", "b")), "2 reads and 2 writes"),
]


@pytest.mark.parametrize(("coder", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_layout_has_no_field_for(tmp_path, coder, reason):
    with pytest.raises(FormatError, match=f"the sparsify format cannot express .*{reason}"):
        convert(coder, tmp_path / "out", "sparsify")
    assert not (tmp_path / "out").exists()
