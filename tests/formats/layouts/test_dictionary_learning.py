"""dictionary_learning: the formulas of its kinds on small weights, both ways, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.writing import D, F, close, inputs, make, run
from unmix.coder.config import BatchTopK, Gated, GroupMax, JumpReLU, Normalise, ReLU, TopK
from unmix.core.errors import ConfigError, FormatError
from unmix.formats import convert, load, load_all

RNG_SEED = 0


def normal(*shape: int, seed: int = RNG_SEED) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def linear(**more: Any) -> dict[str, Tensor]:
    return {"encoder.weight": normal(F, D), "decoder.weight": normal(D, F)} | more


def matrices(**more: Any) -> dict[str, Tensor]:
    return {
        "W_enc": normal(D, F), "b_enc": normal(F, seed=2), "W_dec": normal(F, D), "b_dec": normal(D),
    } | more  # fmt: skip


def topk(threshold: float = 1.0) -> dict[str, Tensor]:
    return linear(
        **{"encoder.bias": normal(F) - 1, "b_dec": normal(D), "k": torch.tensor(4, dtype=torch.int32)},
        threshold=torch.tensor(threshold),
    )


def saved(folder: Path, tensors: dict[str, Tensor], cls: str | None = None, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    if cls is not None:
        said = {"dict_class": cls, "lm_name": "gpt2", "submodule_name": "resid_post_layer_3"} | trainer
        (folder / "config.json").write_text(json.dumps({"trainer": said, "buffer": {"ctx_len": 128}}))
    return folder


def test_auto_encoder_has_its_decoder_normalised(tmp_path):
    w, x = linear(**{"encoder.bias": normal(F), "bias": normal(D)}), inputs()
    coder = load(saved(tmp_path / "trainer_0", w, "AutoEncoder"))
    acts, recon = run(coder, x)
    codes = ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    assert close(acts, codes * w["decoder.weight"].norm(dim=0))
    assert close(recon, codes @ w["decoder.weight"].T + w["bias"])
    assert coder.config.reads == ("blocks.3.resid_post",)
    assert coder.config.training["dictionary_learning"]["buffer"] == {"ctx_len": 128}


def test_auto_encoder_new_subtracts_nothing(tmp_path):
    w, x = linear(**{"encoder.bias": normal(F), "decoder.bias": normal(D)}), inputs()
    acts, recon = run(load(saved(tmp_path / "a", w, "AutoEncoderNew")), x)
    codes = (x @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    assert close(acts, codes) and close(recon, codes @ w["decoder.weight"].T + w["decoder.bias"])


def test_gated_by_formula(tmp_path):
    w = linear(decoder_bias=normal(D), gate_bias=normal(F), mag_bias=normal(F, seed=7), r_mag=normal(F, seed=8))
    x = inputs()
    acts, recon = run(load(saved(tmp_path / "a", w, "GatedAutoEncoder")), x)
    s = (x - w["decoder_bias"]) @ w["encoder.weight"].T
    codes = (s + w["gate_bias"] > 0) * (w["r_mag"].exp() * s + w["mag_bias"]).relu()
    assert close(acts, codes) and close(recon, codes @ w["decoder.weight"].T + w["decoder_bias"])


def test_jumprelu_by_formula(tmp_path):
    w, x = matrices(threshold=torch.linspace(0.1, 3, F)), inputs()
    acts, recon = run(load(saved(tmp_path / "a", w)), x)  # the tensors say which kind it is
    z = x @ w["W_enc"] + w["b_enc"]
    codes = torch.where(z > w["threshold"], z, 0.0)
    assert 0 < (codes != 0).sum() < (z > 0).sum()
    assert close(acts, codes) and close(recon, codes @ w["W_dec"] + w["b_dec"])


def test_topk_and_batchtopk_share_their_tensors(tmp_path):
    w, x = topk(), inputs()
    z = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    best = z.topk(4, dim=-1)
    coder = load(saved(tmp_path / "a", w, "AutoEncoderTopK"))
    assert close(run(coder, x)[0], torch.zeros_like(z).scatter(-1, best.indices, best.values))
    assert coder.config.training["dictionary_learning"]["tensors"] == {"threshold": 1.0}
    acts, recon = run(load(saved(tmp_path / "b", w, "BatchTopKSAE")), x)
    codes = torch.where(z > 1.0, z, 0.0)
    assert close(acts, codes) and close(recon, codes @ w["decoder.weight"].T + w["b_dec"])
    with pytest.raises(FormatError, match=r"ae\.pt can be AutoEncoderTopK or BatchTopKSAE: .* config\.json with"):
        load(saved(tmp_path / "c", w))


def test_topk_before_it_had_k_and_threshold(tmp_path):
    w = {key: t for key, t in topk().items() if key not in ("k", "threshold")}
    assert load(saved(tmp_path / "a", w, "AutoEncoderTopK", k=5)).config.activation == TopK(k=5, relu="before")
    with pytest.raises(FormatError, match=r"config\.json: trainer\.k is missing, expected a whole number above 0"):
        load(saved(tmp_path / "b", w, "AutoEncoderTopK"))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_matryoshka_by_formula(tmp_path, prefix):
    groups = torch.tensor([5, 15])
    w = matrices(k=torch.tensor(4), threshold=torch.tensor(1.2), group_sizes=groups)
    x = inputs()
    coder = load(saved(tmp_path / "a", {prefix + key: t for key, t in w.items()}, "MatryoshkaBatchTopKSAE"))
    z = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert close(run(coder, x)[0], torch.where(z > 1.2, z, 0.0))
    assert coder.config.training["dictionary_learning"]["tensors"]["group_sizes"] == [5, 15]


def test_a_threshold_that_was_never_calibrated(tmp_path):
    coder = load(saved(tmp_path / "a", topk(threshold=-1.0), "BatchTopKSAE"))
    with pytest.raises(ConfigError, match="threshold was never calibrated"):
        coder.encode(inputs())
    assert coder.train().encode(inputs()).values.numel() <= 4 * 16


@pytest.mark.parametrize("scaled", [True, False])
def test_activation_statistics_of_the_fork(tmp_path, scaled):
    std = torch.linspace(0.5, 2, D)
    more = {
        "activation_mean": normal(D), "activation_std": std if scaled else std * float("nan"),
        "activation_global_scale": torch.tensor(0.4), "target_rms": torch.tensor(1.0),
    }  # fmt: skip
    w, x = topk() | more, inputs()
    acts, recon = run(load(saved(tmp_path / "a", w, "BatchTopKSAE")), x)
    s = (x - more["activation_mean"]) * 0.4 if scaled else x
    z = ((s - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    codes = torch.where(z > 1.0, z, 0.0)
    y = codes @ w["decoder.weight"].T + w["b_dec"]
    assert close(acts, codes) and close(recon, y / 0.4 + more["activation_mean"] if scaled else y)


def test_what_does_not_fit(tmp_path):
    w = linear(**{"encoder.bias": normal(F), "bias": normal(D)})
    with pytest.raises(FormatError, match=r"dict_class is 'GatedAutoEncoder', but ae\.pt holds the tensors of AutoEnc"):
        load(saved(tmp_path / "a", w, "GatedAutoEncoder"))
    with pytest.raises(FormatError, match=r"decoder.weight is \[20, 6\], expected \[6, 20\]"):
        load(saved(tmp_path / "b", w | {"decoder.weight": torch.ones(F, D)}, "AutoEncoder"))
    with pytest.raises(FormatError, match="no known format"):
        load(saved(tmp_path / "c", w | {"extra": torch.ones(1)}, "AutoEncoder"))


def test_a_checkpoint_knows_the_config_above(tmp_path):
    trainer = saved(tmp_path / "trainer_0", topk(), "BatchTopKSAE")
    (trainer / "checkpoints").mkdir()
    torch.save(topk(2.0), trainer / "checkpoints" / "ae_100.pt")
    coder = load(trainer / "checkpoints" / "ae_100.pt")
    assert coder.config.activation == BatchTopK(k=4) and float(coder.threshold) == 2.0
    assert coder.config.reads == ("blocks.3.resid_post",)


def test_k_that_is_no_whole_number(tmp_path):
    with pytest.raises(FormatError, match=r"ae\.pt: k is 2\.5, expected a whole number"):
        load(saved(tmp_path / "a", topk() | {"k": torch.tensor(2.5)}, "AutoEncoderTopK"))
    with pytest.raises(FormatError, match=r"ae\.pt: k is nan, expected a whole number"):
        load(saved(tmp_path / "b", topk() | {"k": torch.tensor(float("nan"))}, "AutoEncoderTopK"))


def test_tensors_of_a_kind_that_others_have_too(tmp_path):
    w = matrices(threshold=torch.ones(F))
    place = saved(tmp_path / "a", w)
    assert load(place).config.activation.kind == "jumprelu"
    (place / "cfg.json").write_text("{}")  # another project's config
    with pytest.raises(FormatError, match="no known format"):
        load(place)


def test_a_sweep_of_trainers(tmp_path):
    for i, k in enumerate((3, 4)):
        saved(tmp_path / f"trainer_{i}", topk() | {"k": torch.tensor(k)}, "AutoEncoderTopK")
    coders = load_all(tmp_path)
    assert {name: coder.config.activation for name, coder in coders.items()} == {
        "trainer_0": TopK(k=3, relu="before"), "trainer_1": TopK(k=4, relu="before"),
    }  # fmt: skip


WRITABLE = [
    (make(ReLU(), pre_bias="own", input_scale=0.7, output_scale=1.3), "AutoEncoderNew"),
    (make(ReLU(), pre_bias="none", normalise=Normalise(kind="standardise")), "AutoEncoderNew"),
    (make(Gated(), pre_bias="own", input_scale=2.0), "GatedAutoEncoder"),
    (make(JumpReLU(), gate_space="decoder_norm", reads=("blocks.4.mlp_in",)), "JumpReluAutoEncoder"),
    (make(TopK(k=3), pre_bias="none"), "AutoEncoderTopK"),
    (make(BatchTopK(k=3), output_scale=2.0), "BatchTopKSAE"),
]


@pytest.mark.parametrize(("coder", "cls"), WRITABLE, ids=range(len(WRITABLE)))
def test_written_coders_compute_the_same(tmp_path, coder, cls):
    convert(coder, tmp_path / "out", "dictionary_learning")
    again = load(tmp_path / "out")
    x = inputs()
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])
    assert again.config.reads == coder.config.reads
    assert again.config.training["dictionary_learning"]["trainer"]["dict_class"] == cls


def test_a_unit_decoder_is_an_auto_encoder(tmp_path):
    coder = make(ReLU())
    with torch.no_grad():
        coder.W_dec.copy_(coder.dictionary)
    convert(coder, tmp_path / "out", "dictionary_learning")
    again, x = load(tmp_path / "out"), inputs()
    assert again.config.training["dictionary_learning"]["trainer"]["dict_class"] == "AutoEncoder"
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])


REFUSED = [
    (make(GroupMax(k=4)), "the activation 'groupmax'; it has relu, gated, jumprelu, topk, batchtopk"),
    (make(TopK(k=2, relu="none", magnitude=True)), "signed codes"),
    (make(JumpReLU(keep_max=True)), "keeps the largest of a token"),
    (make(ReLU(), normalise=Normalise(kind="layer_norm")), "the normalisation 'layer_norm'"),
    (make(ReLU(), writes=("blocks.2.mlp_out",)), "writes blocks.2.mlp_out"),
]


@pytest.mark.parametrize(("coder", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_layout_has_no_field_for(tmp_path, coder, reason):
    with pytest.raises(FormatError, match=f"the dictionary_learning format cannot express .*{reason}"):
        convert(coder, tmp_path / "out", "dictionary_learning")
    assert not (tmp_path / "out").exists()
