"""e2e_sae: its formula on small weights, several positions in a file, the flat form, both ways, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from formats.writing import D, F, close, inputs, make, run
from unmix.coder.config import Normalise, ReLU, TopK
from unmix.core.errors import ConfigError, FormatError
from unmix.formats import convert, load, load_all
from unmix.formats.draft import Draft
from unmix.formats.layouts.e2e_sae import E2eSaeFormat

POSITIONS = ["blocks.2.hook_resid_pre", "blocks.6.mlp.hook_out"]


def weights(seed: int = 0, flat: bool = False) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    first = "encoder" if flat else "encoder.0"
    return {
        f"{first}.weight": normal(F, D), f"{first}.bias": normal(F), "decoder.weight": normal(D, F) * 2,
        "decoder.bias": normal(D),
    }  # fmt: skip


def saved(folder: Path, tensors: dict[str, Tensor], positions: Any = None, n: int = 1000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / f"samples_{n}.pt")
    if positions is not None:
        config = {"saes": {"sae_positions": positions}, "tlens_model_name": "gpt2", "seed": 0}
        (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def several(folder: Path, positions: list[str] = POSITIONS) -> Path:
    tensors = {f"{p.replace('.', '-')}.{k}": t for i, p in enumerate(positions) for k, t in weights(i).items()}
    return saved(folder, tensors, positions)


def expected(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    first = "encoder" if "encoder.weight" in w else "encoder.0"
    codes = (x @ w[f"{first}.weight"].T + w[f"{first}.bias"]).relu()
    unit = w["decoder.weight"] / w["decoder.weight"].norm(dim=0)
    return codes, codes @ unit.T + w["decoder.bias"]


def test_several_positions_by_formula(tmp_path):
    place, x = several(tmp_path / "run"), inputs()
    coders = load_all(place)
    assert [coder.config.reads for coder in coders.values()] == [
        ("blocks.2.resid_pre~centred",), ("blocks.6.mlp_out~centred",)
    ]  # fmt: skip
    for i, coder in enumerate(coders.values()):
        acts, recon = run(coder, x)
        assert close(acts, expected(weights(i), x)[0]) and close(recon, expected(weights(i), x)[1])
        assert coder.config.model is not None and coder.config.model.name == "gpt2"
    with pytest.raises(FormatError, match=r"holds 2 coders: blocks\.2\.hook_resid_pre, blocks\.6\.mlp\.hook_out"):
        load(place)
    with pytest.raises(ConfigError, match=r"no coder 'blocks\.2\.hook_resid_pr' here"):
        load(place, name="blocks.2.hook_resid_pr")
    again = load(place / "samples_1000.pt", name=POSITIONS[1])
    assert close(run(again, x)[1], expected(weights(1), x)[1])


def test_the_file_after_the_most_samples(tmp_path):
    x = inputs()
    for n in (900, 10000, 1000):
        saved(tmp_path, {f"blocks-1-hook_resid_pre.{k}": t for k, t in weights(n).items()}, POSITIONS[:1], n)
    assert close(run(load(tmp_path), x)[0], expected(weights(10000), x)[0])
    assert close(run(load(tmp_path / "samples_900.pt"), x)[0], expected(weights(900), x)[0])


def test_flat_form(tmp_path):
    x, w = inputs(), weights(3, flat=True)
    coder = load(saved(tmp_path / "a", w, POSITIONS[:1]))
    assert close(run(coder, x)[1], expected(w, x)[1])
    assert coder.config.reads == ("blocks.2.resid_pre~centred",)
    assert load(saved(tmp_path / "b", w, "blocks.5.hook_resid_post")).config.reads == ("blocks.5.resid_post~centred",)
    assert load(saved(tmp_path / "c", w, POSITIONS)).config.reads == ("input",)


def test_flat_tensors_alone_may_be_anyones(tmp_path):
    place = saved(tmp_path / "a", weights(flat=True))
    with pytest.raises(FormatError, match=r"may be .*e2e_sae.*choose with format=") as caught:
        load(place)
    assert "dictionary_learning" in str(caught.value)
    x = inputs()
    mine = run(load(place, format="e2e_sae"), x)
    theirs = run(load(place, format="dictionary_learning"), x)
    assert close(mine[1], expected(weights(flat=True), x)[1])
    assert torch.equal(mine[0], theirs[0]) and not close(mine[1], theirs[1])


def test_what_does_not_fit(tmp_path):
    base = {f"a-b.{k}": t for k, t in weights().items()}
    with pytest.raises(FormatError, match=r"unknown tensor a-b\.extra; expected encoder\.0\.weight"):
        load(saved(tmp_path / "a", base | {"a-b.extra": torch.ones(1)}))
    with pytest.raises(FormatError, match=r"a-b\.decoder\.weight is \[20, 6\], expected \[6, 20\]"):
        load(saved(tmp_path / "b", base | {"a-b.decoder.weight": torch.ones(F, D)}))
    with pytest.raises(FormatError, match=r"a-b\.decoder\.bias is missing"):
        load(saved(tmp_path / "c", {k: t for k, t in base.items() if "decoder.bias" not in k}))


@pytest.mark.parametrize("name", ["--", "../../up", "/etc", "a/b", ""])
def test_a_position_that_is_a_path_is_none(tmp_path, name):
    with pytest.raises(FormatError, match="no known format"):
        load_all(saved(tmp_path / "a", {f"{name}.{k}": t for k, t in weights().items()}))


def test_a_latent_that_writes_nothing_stays_one(tmp_path):
    w = {f"a.{k}": t for k, t in weights().items()}
    w["a.decoder.weight"][:, 3] = 0
    coder = load(saved(tmp_path / "a", w))
    assert not coder.W_dec[3].any() and torch.isfinite(run(coder, inputs())[1]).all()


WRITABLE = [
    make(ReLU()),
    make(ReLU(), pre_bias="own", input_scale=0.7, output_scale=1.3, reads=("blocks.4.mlp_act",)),
    make(ReLU(), pre_bias="none", normalise=Normalise(kind="standardise")),
    make(ReLU(), gate_space="decoder_norm", reads=("embeddings",)),
]


@pytest.mark.parametrize("coder", WRITABLE, ids=range(len(WRITABLE)))
def test_written_outputs_stay_and_codes_carry_the_norms(tmp_path, coder):
    convert(coder, tmp_path / "out", "e2e_sae")
    again, x = load(tmp_path / "out"), inputs()
    assert close(run(again, x)[1], run(coder, x)[1])
    scale = coder.norm_scale.detach() if coder.config.normalise.kind == "standardise" else torch.ones(D)
    norms = (coder.W_dec.detach() * coder.config.output_scale / scale).norm(dim=-1)
    assert close(run(again, x)[0], run(coder, x)[0] * norms)
    assert again.config.reads == coder.config.reads


def test_a_run_is_written_as_one_file(tmp_path):
    convert(several(tmp_path / "run"), tmp_path / "out", "e2e_sae")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["final_config.yaml", "samples_0.pt"]
    config = yaml.safe_load((tmp_path / "out" / "final_config.yaml").read_text())
    assert config["saes"] == {"dict_size_to_input_ratio": F / D, "sae_positions": POSITIONS}
    assert config["tlens_model_name"] == "gpt2" and config["seed"] == 0
    x = inputs()
    for i, coder in enumerate(load_all(tmp_path / "out").values()):
        assert close(run(coder, x)[0], expected(weights(i), x)[0])


REFUSED = [
    (make(TopK(k=2)), "the activation 'topk'; it has relu"),
    (make(ReLU(), normalise=Normalise(kind="layer_norm")), "the normalisation 'layer_norm'"),
    (make(ReLU(), reads=("blocks.1.z#3",)), "the position blocks.1.z#3"),
    (make(ReLU(), reads=("odd-name",)), "'-' stands for '.'"),
    (make(ReLU(), writes=("blocks.2.mlp_out",)), "writes blocks.2.mlp_out"),
]


@pytest.mark.parametrize(("coder", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_layout_has_no_field_for(tmp_path, coder, reason):
    with pytest.raises(FormatError, match=f"the e2e_sae format cannot express .*{reason}"):
        convert(coder, tmp_path / "out", "e2e_sae")
    assert not (tmp_path / "out").exists()


def test_what_one_file_cannot_hold(tmp_path):
    two = {"a": Draft.of(make(ReLU())), "b": Draft.of(make(ReLU()))}
    with pytest.raises(FormatError, match="two coders at one position"):
        E2eSaeFormat().write(two, tmp_path)
    wide = {"a": Draft.of(make(ReLU())), "b": Draft.of(make(ReLU(), reads=("b",), n_latents=30))}
    with pytest.raises(FormatError, match="different ratios of latents to inputs"):
        E2eSaeFormat().write(wide, tmp_path)
