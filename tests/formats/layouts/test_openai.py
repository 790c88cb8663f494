"""OpenAI's sparse_autoencoder: its formulas on small weights, both ways, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.writing import D, F, close, inputs, make, run
from unmix.coder.config import Gated, Identity, JumpReLU, Normalise, ReLU, TopK
from unmix.core.errors import FormatError, NonFiniteError
from unmix.formats import convert, load, load_all

LAYERED = Normalise(kind="layer_norm")


def weights(**more: Any) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return {
        "pre_bias": normal(D), "encoder.weight": normal(F, D), "latent_bias": normal(F),
        "decoder.weight": normal(D, F), "stats_last_nonzero": torch.arange(F),
        "latents_activation_frequency": torch.linspace(0, 1, F), "latents_mean_square": torch.linspace(0, 2, F),
    } | more  # fmt: skip


def topk(after: str = "ReLU", k: Any = 4) -> dict[str, Any]:
    return {"activation": "TopK", "activation_state_dict": {"k": k, "postact_fn": after}}


def saved(folder: Path, tree: dict[str, Any], name: str = "resid_post_mlp_v5_32k/autoencoders/8.pt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)
    return path


@pytest.mark.parametrize("says", [{}, {"activation": "ReLU", "activation_state_dict": {}}])
def test_relu_by_formula(tmp_path, says):
    w, x = weights(**says), inputs()
    coder = load(saved(tmp_path, w, "mlp_post_act_v4/autoencoders/11.pt"))
    acts, recon = run(coder, x)
    expected = ((x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]).relu()
    assert close(acts, expected)
    assert close(recon, expected @ w["decoder.weight"].T + w["pre_bias"])
    assert coder.config.reads == coder.config.writes == ("blocks.11.mlp_act",)
    assert torch.equal(coder.statistics["stats_last_nonzero"], torch.arange(F))


@pytest.mark.parametrize("after", ["ReLU", "Identity"])
def test_topk_by_formula(tmp_path, after):
    w, x = weights(**topk(after)), inputs()
    w["latent_bias"] -= 6  # most rows have fewer than k positive pre-activations
    acts, recon = run(load(saved(tmp_path, w)), x)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = ((x - mean) / (std + 1e-5) - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    best = z.topk(4, dim=-1)
    expected = torch.zeros_like(z).scatter(-1, best.indices, best.values)
    assert (best.values < 0).any()
    expected = expected.relu() if after == "ReLU" else expected
    assert close(acts, expected)
    assert close(recon, (expected @ w["decoder.weight"].T + w["pre_bias"]) * std + mean)


BAD = [
    ({"activation": "JumpReLU"}, r"8\.pt: activation is 'JumpReLU'"),
    ({"activation": 3}, "activation is '?3'?"),
    ({"activation_state_dict": {"k": 4}}, "activation is None"),
    (topk(k=2.5), r"activation_state_dict\.k is 2\.5, expected a whole number above 0"),
    (topk(k=F + 1), "k is 21, larger than n_latents = 20"),
    (topk("Tanh"), r"activation_state_dict\.postact_fn is 'Tanh'"),
    ({"decoder.weight": torch.ones(F, D)}, r"decoder.weight is \[20, 6\], expected \[6, 20\]"),
    ({"extra": torch.ones(1)}, "unknown tensor extra"),
    ({"latent_bias": torch.ones(F, dtype=torch.int64)}, "latent_bias is int64, expected one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_fit(tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        load(saved(tmp_path, weights(**change)))


def test_nan_is_refused(tmp_path):
    w = weights()
    w["latent_bias"][2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"8\.pt: latent_bias holds NaN or infinity"):
        load(saved(tmp_path, w))


def test_places(tmp_path, caplog):
    for layer in (3, 4):
        saved(tmp_path, weights(), f"gpt2-small/resid_delta_mlp/autoencoders/{layer}.pt")
    saved(tmp_path, weights(note="x"), "gpt2-small/mlp_post_act/autoencoders/3.pt")
    with caplog.at_level(logging.WARNING, logger="unmix"):
        coders = load_all(tmp_path / "gpt2-small")
    assert "keys kept but not understood: note" in caplog.text
    assert {name: coder.config.reads[0] for name, coder in coders.items()} == {
        "mlp_post_act/autoencoders/3": "blocks.3.mlp_act",
        "resid_delta_mlp/autoencoders/3": "blocks.3.mlp_out_post",
        "resid_delta_mlp/autoencoders/4": "blocks.4.mlp_out_post",
    }
    assert {coder.config.model.name for coder in coders.values() if coder.config.model} == {"gpt2"}
    with pytest.raises(FormatError, match="holds 2 coders: 3, 4"):
        load(tmp_path / "gpt2-small" / "resid_delta_mlp" / "autoencoders")
    bare = saved(tmp_path / "else", weights(), "sae.pt")
    assert load(bare).config.reads == ("input",)


WRITABLE = [
    make(ReLU()),
    make(ReLU(), pre_bias="own", input_scale=0.7, output_scale=1.3),
    make(ReLU(), pre_bias="none", normalise=Normalise(kind="standardise")),
    make(ReLU(), gate_space="decoder_norm", reads=("blocks.1.resid_pre",)),
    make(TopK(k=3), normalise=LAYERED, reads=("blocks.4.attn_out_post",)),
    make(TopK(k=3, relu="none"), normalise=LAYERED),
    make(TopK(k=3, relu="before"), normalise=LAYERED, pre_bias="none", output_scale=2.0),
    make(Identity()),
]


@pytest.mark.parametrize("coder", WRITABLE, ids=range(len(WRITABLE)))
def test_written_coders_compute_the_same(tmp_path, coder):
    convert(coder, tmp_path / "out", "openai")
    again = load(tmp_path / "out")
    x = inputs()
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])
    assert again.config.reads == coder.config.reads


def test_a_gate_on_norms_moves_into_the_codes(tmp_path):
    coder = make(TopK(k=3), normalise=LAYERED, gate_space="decoder_norm")
    convert(coder, tmp_path / "out", "openai")
    x, again = inputs(), load(tmp_path / "out")
    assert close(run(again, x)[1], run(coder, x)[1])
    assert close(run(again, x)[0], run(coder, x)[0] * coder.W_dec.detach().norm(dim=-1))


REFUSED = [
    (make(JumpReLU()), "the activation 'jumprelu'"),
    (make(Gated()), "the activation 'gated'; it has relu, topk, identity"),
    (make(TopK(k=2)), "topk without layer norm"),
    (make(ReLU(), normalise=LAYERED), "relu with layer norm"),
    (make(TopK(k=2), normalise=Normalise(kind="layer_norm", eps_back=True)), "eps_back=True"),
    (make(ReLU(), normalise=Normalise(kind="constant_norm")), "the normalisation 'constant_norm'"),
    (make(TopK(k=2, relu="none", magnitude=True), normalise=LAYERED), "selection by magnitude"),
    (make(ReLU(), writes=("blocks.2.mlp_out",)), "reads blocks.2.resid_post and writes blocks.2.mlp_out"),
    (make(ReLU(), skip=True), "a skip matrix"),
    (make(ReLU(), reads=("a", "b")), "2 reads and 2 writes"),
]


@pytest.mark.parametrize(("coder", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_layout_has_no_field_for(tmp_path, coder, reason):
    with pytest.raises(FormatError, match=f"the openai format cannot express .*{reason}"):
        convert(coder, tmp_path / "out", "openai")
    assert not (tmp_path / "out").exists()
