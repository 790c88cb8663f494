"""Crosscoders of the dictionary_learning fork: their formulas on small weights, both ways, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.writing import close, make, run
from unmix.coder.config import BatchTopK, JumpReLU, Normalise, ReLU
from unmix.core.errors import ConfigError, FormatError, NonFiniteError
from unmix.formats import convert, load

L, D, F = 2, 5, 12
NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def weights(**more: Tensor) -> dict[str, Tensor]:
    return {
        "encoder.weight": normal(L, D, F), "encoder.bias": normal(F), "decoder.weight": normal(L, F, D),
        "decoder.bias": normal(L, D),
    } | more  # fmt: skip


def gated(number: int, threshold: Tensor | float = 3.0) -> dict[str, Tensor]:
    return weights(k=torch.tensor(4), threshold=torch.as_tensor(threshold), code_normalization_id=torch.tensor(number))


def saved(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "model_final.pt")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def inputs() -> Tensor:
    return normal(16, L, D) * 1.5 + 0.2


def check(place: Path, codes: Tensor, w: dict[str, Tensor], x: Tensor) -> None:
    acts, recon = run(load(place), x.flatten(1))
    assert close(acts, codes)
    assert close(recon, (torch.einsum("bf,lfd->bld", codes, w["decoder.weight"]) + w["decoder.bias"]).flatten(1))


def pre(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return (torch.einsum("bld,ldf->bf", x, w["encoder.weight"]) + w["encoder.bias"]).relu()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_relu_by_formula(tmp_path, prefix):
    w, x = weights(), inputs()
    place = saved(tmp_path / "a", {prefix + key: t for key, t in w.items()})
    check(place, pre(w, x), w, x)
    assert load(place).config.reads == ("input.0", "input.1")
    assert load(place).config.training["dictionary_learning_crosscoder"]["code_normalization_id"] == 1


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_batchtopk_compares_with_its_own_factor(tmp_path, number):
    w, x = gated(number), inputs()
    norms = w["decoder.weight"].norm(dim=-1)
    whole = w["decoder.weight"].norm(dim=(0, 2))
    factor = {1: norms.sum(0), 2: whole, 3: 0.7 * whole + 0.2 * norms.sum(0), 4: torch.ones(F)}[number]
    z = pre(w, x)
    codes = torch.where(z * factor > 3.0, z, 0.0)
    assert 0 < (codes != 0).sum() < (z > 0).sum()
    place = saved(tmp_path / "a", w, code_normalization_alpha_sae=0.7, code_normalization_alpha_cc=0.2)
    check(place, codes, w, x)


def test_decoupled_codes_are_one_a_hook(tmp_path):
    theta = torch.tensor([1.5, 3.0])
    w, x = gated(5, theta), inputs()
    z = pre(w, x)
    codes = z[:, None] * (z[:, None] * w["decoder.weight"].norm(dim=-1) > theta[:, None])
    acts, recon = run(load(saved(tmp_path / "a", w)), x.flatten(1))
    assert ((codes[:, 0] != 0) != (codes[:, 1] != 0)).any()
    assert close(acts, codes.flatten(1))
    assert close(recon, (torch.einsum("blf,lfd->bld", codes, w["decoder.weight"]) + w["decoder.bias"]).flatten(1))
    with pytest.raises(FormatError, match="applies them twice"):
        load(saved(tmp_path / "b", w | statistics()))


def statistics(**more: Tensor) -> dict[str, Tensor]:
    return {
        "activation_mean": normal(L, D), "activation_std": torch.linspace(0.5, 2, L * D).reshape(L, D),
        "activation_global_scale": torch.tensor([0.4, 0.7]), "target_rms": torch.tensor(2.0),
    } | more  # fmt: skip


@pytest.mark.parametrize("stored", [True, False])
def test_statistics_by_formula(tmp_path, stored):
    more = statistics()
    scale = more["activation_global_scale"]
    if not stored:
        del more["activation_global_scale"]
        scale = 2.0 / (more["activation_std"].square().sum(-1) + 1e-8).sqrt()
    w, x = weights(**more), inputs()
    acts, recon = run(load(saved(tmp_path / "a", w)), x.flatten(1))
    codes = pre(w, (x - more["activation_mean"]) * scale[:, None])
    y = torch.einsum("bf,lfd->bld", codes, w["decoder.weight"]) + w["decoder.bias"]
    assert close(acts, codes) and close(recon, (y / scale[:, None] + more["activation_mean"]).flatten(1))


def test_statistics_a_number_each(tmp_path):
    more = statistics(activation_global_scale=torch.ones(L))
    w, x = weights(**more), inputs()
    place = saved(tmp_path / "a", w, keep_relative_variance=False)
    expected = pre(w, (x - more["activation_mean"]) / (more["activation_std"] + 1e-8))
    assert close(run(load(place), x.flatten(1))[0], expected)


def test_nan_means_no_statistics_and_a_scale_of_zero_nothing_at_all(tmp_path):
    w, x = weights(**statistics(activation_mean=torch.full((L, D), NAN))), inputs()
    check(saved(tmp_path / "a", w), pre(w, x), w, x)
    zero = weights(**statistics(activation_global_scale=torch.zeros(L)))
    with pytest.raises(NonFiniteError, match="statistics give scales of 0, NaN or infinity"):
        load(saved(tmp_path / "b", zero))


BAD = [
    (gated(6), "code_normalization_id is 6, expected one of 1, 2, 3, 4, 5"),
    (weights(k=torch.tensor(4)), "k and threshold belong together"),
    (gated(5, 1.0), "threshold is one number, expected one for each of 2 hooks"),
    (weights(extra=torch.ones(1)), "unknown tensor extra"),
    (weights(**{"decoder.weight": torch.ones(L, D, F)}), r"decoder.weight is \[2, 5, 12\], expected \[2, 12, 5\]"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD, ids=range(len(BAD)))
def test_what_does_not_fit(tmp_path, tensors, message):
    with pytest.raises(FormatError, match=message):
        load(saved(tmp_path / "a", tensors))


def test_checkpoints_and_the_form_of_the_hub(tmp_path):
    w, x = gated(1), inputs()
    place = saved(tmp_path / "run", w)
    torch.save(w, place / "checkpoint_100.pt")
    with pytest.raises(FormatError, match="holds 2 coders: checkpoint_100, model_final"):
        load(place)
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file({key: t for key, t in w.items() if key != "code_normalization_id"}, hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({"code_normalization": "NONE", "k": 4, "num_layers": L}))
    z = pre(w, x)
    check(hub, torch.where(z > 3.0, z, 0.0), w, x)
    (hub / "config.json").write_text(json.dumps({"code_normalization": "SOME"}))
    with pytest.raises(FormatError, match="code_normalization is 'SOME'"):
        load(hub)


def test_options_of_the_constructor(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="unmix"):
        load(saved(tmp_path / "a", weights(), encoder_layers=[0, 1], brand_new=3, num_layers=L))
    assert "keys kept but not understood: brand_new" in caplog.text
    with pytest.raises(FormatError, match=r"encoder_layers is \[1, 0\], expected all 2 in order"):
        load(saved(tmp_path / "b", weights(), encoder_layers=[1, 0]))


def test_thresholds_that_were_never_calibrated(tmp_path, caplog):
    x = inputs().flatten(1)
    coder = load(saved(tmp_path / "a", gated(1, -1.0)))
    with pytest.raises(ConfigError, match="threshold was never calibrated"):
        coder.encode(x)
    w = gated(5, torch.tensor([-1.0, 3.0]))
    with caplog.at_level(logging.WARNING, logger="unmix"):
        acts, _ = run(load(saved(tmp_path / "b", w)), x)
    assert "a threshold below 0 was never calibrated" in caplog.text
    assert close(acts[:, :F], pre(w, inputs()))


HOOKS: dict[str, Any] = {"reads": ("blocks.1.resid_post", "blocks.2.resid_post"), "d_in": L * D, "n_latents": F}


def one_scale_a_hook(**fields: Any) -> Any:
    coder = make(BatchTopK(k=3), normalise=Normalise(kind="standardise"), **HOOKS, **fields)
    with torch.no_grad():
        coder.norm_scale.copy_(torch.tensor([0.5, 2.0]).repeat_interleave(D))
    return coder


WRITABLE = [
    make(ReLU(), **HOOKS, pre_bias="none"),
    make(ReLU(), **HOOKS, pre_bias="own", input_scale=0.7, output_scale=1.3, gate_space="decoder_norm"),
    make(BatchTopK(k=3), **HOOKS, gate_space="decoder_norm_sum"),
    make(BatchTopK(k=3), **HOOKS, gate_space="decoder_norm", pre_bias="none"),
    make(BatchTopK(k=3), **HOOKS, normalise=Normalise(kind="standardise")),
    one_scale_a_hook(gate_space="decoder_norm_sum"),
]


@pytest.mark.parametrize("coder", WRITABLE, ids=range(len(WRITABLE)))
def test_written_coders_compute_the_same(tmp_path, coder):
    convert(coder, tmp_path / "out", "dictionary_learning_crosscoder")
    again, x = load(tmp_path / "out"), inputs().flatten(1)
    assert close(run(again, x)[0], run(coder, x)[0]) and close(run(again, x)[1], run(coder, x)[1])
    assert again.config.reads == again.config.writes == coder.config.reads


def test_one_scale_a_hook_stays_a_statistic(tmp_path):
    convert(one_scale_a_hook(), tmp_path / "out", "dictionary_learning_crosscoder")
    assert load(tmp_path / "out").config.normalise.kind == "standardise"


def test_a_stored_factor_moves_into_the_codes(tmp_path):
    coder = make(BatchTopK(k=3), **HOOKS, gate_space="own")
    convert(coder, tmp_path / "out", "dictionary_learning_crosscoder")
    again, x = load(tmp_path / "out"), inputs().flatten(1)
    assert close(run(again, x)[1], run(coder, x)[1])
    assert close(run(again, x)[0], run(coder, x)[0] * coder.gate_scale.detach())


REFUSED = [
    (make(JumpReLU(), **HOOKS), "the activation 'jumprelu'; it has relu, batchtopk"),
    (make(ReLU(), **HOOKS | {"reads": ("a",), "writes": ("a", "b")}), "writes other hooks than it reads"),
    (make(ReLU(), **HOOKS, write_widths=(4, 6)), r"hooks of different widths, found \[4, 6\]"),
    (make(ReLU(), **HOOKS, skip=True), "a skip matrix"),
]


@pytest.mark.parametrize(("coder", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_layout_has_no_field_for(tmp_path, coder, reason):
    with pytest.raises(FormatError, match=f"the dictionary_learning_crosscoder format cannot express .*{reason}"):
        convert(coder, tmp_path / "out", "dictionary_learning_crosscoder")
    assert not (tmp_path / "out").exists()
