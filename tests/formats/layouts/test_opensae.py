"""OpenSAE: its formulas on small weights, its three layouts, both ways, and what is refused."""

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
from unmix.coder.config import JumpReLU, Normalise, ReLU, TopK
from unmix.core.errors import FormatError
from unmix.formats import convert, load, load_all

CONFIG = {
    "architectures": ["OpenSae"], "hidden_size": D, "feature_size": F, "input_normalize": True,
    "normalize_shift_back": False, "input_normalize_eps": 0.01, "input_hookpoint": "layers.25",
    "output_hookpoint": "layers.25", "model_name": "meta-llama/meta-llama-3.1-8b", "activation": "topk", "k": 4,
    "normalize_decoder": True, "decoder_impl": "triton", "multi_topk": 4, "auxk_alpha": 0.01, "l1_coef": None,
    "torch_dtype": "float32", "transformers_version": "4.46.0",
}  # fmt: skip


def weights(**more: Tensor) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return {
        "encoder.weight": normal(F, D), "encoder.bias": normal(F) - 2, "W_dec": normal(F, D), "b_dec": normal(D),
    } | more  # fmt: skip


def saved(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def normal(x: Tensor, eps: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (std + eps), mean, std + eps


@pytest.mark.parametrize("back", [True, False])
def test_topk_by_formula(tmp_path, back, caplog):
    w, x = weights(), inputs()
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coder = load(saved(tmp_path / "a", w, normalize_shift_back=back))
    assert not caplog.text
    acts, recon = run(coder, x)
    s, mean, std = normal(x)
    z = ((s - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    best = z.topk(4, dim=-1)
    expected = torch.zeros_like(z).scatter(-1, best.indices, best.values)
    assert ((expected > 0).sum(-1) < 4).any()
    y = expected @ w["W_dec"] + w["b_dec"]
    assert close(acts, expected) and close(recon, y * std + mean if back else y)
    assert coder.config.reads == coder.config.writes == ("blocks.25.resid_post",)
    assert coder.config.model is not None and coder.config.model.name == "meta-llama/meta-llama-3.1-8b"
    assert coder.config.training["opensae"]["multi_topk"] == 4


def test_jumprelu_keeps_a_tokens_largest(tmp_path):
    w, x = weights(), inputs()
    z = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    largest = z.amax(-1, keepdim=True)
    theta = float(largest.median())
    assert (largest > 0).all() and (largest < theta).any() and (largest > theta).any()
    config = {"activation": "jumprelu", "jumprelu_theta": theta + 0.01, "input_normalize": False}
    acts, recon = run(load(saved(tmp_path / "a", w, **config)), x)
    expected = torch.where((z > theta + 0.01) | (z == largest), z, 0.0)
    assert close(acts, expected) and close(recon, expected @ w["W_dec"] + w["b_dec"])


def test_shards_and_naming_one_of_their_files(tmp_path):
    w = weights()
    place = saved(tmp_path / "a", w)
    whole = load(place)
    (place / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [{k: w[k] for k in ("encoder.weight", "b_dec")}, {k: w[k] for k in ("W_dec", "encoder.bias")}]
    for name, part in zip(names, parts, strict=True):
        save_file(part, place / name)
    index = {"metadata": {}, "weight_map": {k: n for n, part in zip(names, parts, strict=True) for k in part}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (place, place / "config.json", place / names[1], place / "model.safetensors.index.json"):
        assert torch.equal(load(path).W_dec, whole.W_dec)


def test_what_the_trainer_saves(tmp_path):
    folder = tmp_path / "saes" / "layers.25"
    folder.mkdir(parents=True)
    for step in (100, 200):
        torch.save(weights(), folder / f"iter_{step:07d}.pt")
    with pytest.raises(FormatError, match=r"iter_0000200\.pt holds the weights of an OpenSAE, but config\.json is"):
        load(folder / "iter_0000200.pt", format="opensae")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError, match="holds 2 coders: iter_0000100, iter_0000200; name one with name="):
        load(folder)
    assert list(load_all(folder)) == ["iter_0000100", "iter_0000200"]
    assert load(folder / "iter_0000200.pt").config.activation == TopK(k=4, relu="before")


BAD = [
    ({"activation": "relu"}, r"config\.json: activation is 'relu'"),
    ({"k": None, "feature_size": F}, "k is 128, larger than n_latents = 20"),
    ({"hidden_size": 7}, r"encoder.weight is \[20, 6\], expected \[20, 7\]"),
    ({"input_normalize": False, "normalize_shift_back": True}, "there is nothing to shift back"),
    ({"input_normalize": "yes"}, 'input_normalize is "yes", expected true or false'),
    ({"activation": "jumprelu", "jumprelu_theta": "big"}, 'jumprelu_theta is "big", expected a number'),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_settings_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        load(saved(tmp_path / "a", weights(), **change))


SHIFTED = Normalise(kind="layer_norm", eps=0.3, eps_back=True)
WRITABLE = [
    make(TopK(k=3), normalise=SHIFTED),
    make(TopK(k=3), normalise=Normalise(kind="layer_norm", restore=False), writes=("blocks.3.mlp_out",)),
    make(TopK(k=3, relu="before"), pre_bias="own", input_scale=0.7, output_scale=1.3, reads=("blocks.1.resid_pre",)),
    make(TopK(k=3), pre_bias="none", normalise=Normalise(kind="standardise")),
]


def thresholded(**fields: Any) -> Any:
    coder = make(JumpReLU(keep_max=fields.pop("keep_max", True)), **fields)
    with torch.no_grad():
        coder.threshold.fill_(1.5)
    return coder


@pytest.mark.parametrize("coder", [*WRITABLE, thresholded(normalise=SHIFTED)], ids=range(len(WRITABLE) + 1))
def test_written_coders_compute_the_same(tmp_path, coder):
    convert(coder, tmp_path / "out", "opensae")
    again = load(tmp_path / "out")
    x = inputs()
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])
    assert (again.config.reads, again.config.writes) == (coder.config.reads, coder.config.writes)


REFUSED = [
    (make(ReLU()), "the activation 'relu'; it has topk, jumprelu"),
    (thresholded(keep_max=False), "a jumprelu that leaves a token with nothing above its threshold empty"),
    (make(JumpReLU(keep_max=True)), "a threshold of its own for each latent"),
    (make(TopK(k=2, relu="none")), "signed codes"),
    (make(TopK(k=2), normalise=Normalise(kind="layer_norm")), "undone with eps"),
    (make(TopK(k=2), skip=True), "a skip matrix"),
    (make(TopK(k=2), d_out=4, pre_bias="none"), "d_out = 4 beside d_in = 6"),
]


@pytest.mark.parametrize(("coder", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_layout_has_no_field_for(tmp_path, coder, reason):
    with pytest.raises(FormatError, match=f"the opensae format cannot express .*{reason}"):
        convert(coder, tmp_path / "out", "opensae")
    assert not (tmp_path / "out").exists()
