"""Pickles of mats_sae_training: names, statistics, provenance; nothing in them is run. Numbers: tests/parity."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from unmix.core.errors import ConfigError, FormatError
from unmix.formats import detect, load, load_all

RECORDED = Path(__file__).parent.parent.parent / "parity" / "sae_lens"


def test_one_coder_and_what_lies_beside_it():
    for kind in ("mats_pt", "mats_gz"):
        coder = load(RECORDED / kind)
        assert coder.config.reads == ("blocks.3.resid_pre~centred",) and coder.config.pre_bias == "tied"
        assert coder.config.model is not None and coder.config.model.name == "gpt2-small"
        assert torch.equal(coder.statistics["log_feature_sparsity"], torch.linspace(-10, -1, 48))
        kept = coder.config.training["mats_sae_training"]
        assert kept["l1_coefficient"] == 8e-5 and kept["dtype"] == "float32" and kept["device"] == "cpu"
        assert coder.config.training["context_size"] == 64


def test_one_file_by_name(tmp_path):
    (file,) = (p for p in (RECORDED / "mats_pt").glob("*.pt") if "sparsity" not in p.name)
    assert "log_feature_sparsity" in load(file).statistics
    shutil.copy(file, tmp_path / "renamed.pkl")
    assert load(tmp_path / "renamed.pkl").statistics == {}
    with pytest.raises(FormatError, match="no known format"):
        load(file.with_name(f"{file.stem}_log_feature_sparsity.pt"))


def test_a_group_holds_several():
    place = RECORDED / "mats_group_pt"
    with pytest.raises(FormatError, match=r"holds 2 coders: blocks.1.resid_pre, blocks.2.resid_pre; name one"):
        load(place)
    coders = load_all(place)
    assert list(coders) == ["blocks.1.resid_pre", "blocks.2.resid_pre"]
    assert torch.equal(coders["blocks.2.resid_pre"].statistics["log_feature_sparsity"], torch.linspace(-9, -2, 48))
    assert load(place, name="blocks.2.resid_pre").config.reads == ("blocks.2.resid_pre~centred",)
    with pytest.raises(ConfigError, match=r"no coder 'blocks.3.resid_pre' here"):
        load(place, name="blocks.3.resid_pre")


def test_several_files_in_one_folder(tmp_path):
    for source in ("mats_pt", "mats_group_gz"):
        for file in (RECORDED / source).iterdir():
            if ".p" in file.name:
                shutil.copy(file, tmp_path / file.name)
    one = "final_sparse_autoencoder_gpt2-small_blocks.3.hook_resid_pre_48"
    group = "final_sae_group_gpt2-small"
    coders = load_all(tmp_path)
    assert list(coders) == [f"{group}/blocks.1.resid_pre", f"{group}/blocks.2.resid_pre", one]
    assert all("log_feature_sparsity" in coder.statistics for coder in coders.values())


class _Config:
    """Pickles as an instance of mats_sae_training's config."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __reduce__(self) -> Any:
        return _make, (), self.__dict__


def _make() -> None: ...


def _pickled(path: Path, config: Any, **state: Any) -> Path:
    """A pickle whose config claims another module than the one it was made in."""
    d, n = 4, 6
    tensors = {"W_enc": torch.ones(d, n), "b_enc": torch.zeros(n), "W_dec": torch.ones(n, d), "b_dec": torch.zeros(d)}
    data = pickle.dumps({"cfg": config, "state_dict": tensors | state}, protocol=2)
    theirs = f"c{__name__}\n_make\n".encode(), b"csae_training.config\nLanguageModelSAERunnerConfig\n"
    assert theirs[0] in data
    path.write_bytes(data.replace(*theirs))
    return path


def test_settings_are_those_of_the_runner(tmp_path):
    base = {"d_in": 4, "d_sae": 6, "hook_point": "blocks.0.hook_mlp_out"}
    coder = load(_pickled(tmp_path / "a.pkl", _Config(**base, apply_b_dec_to_input=False, hook_point_head_index=1)))
    assert coder.config.pre_bias == "none" and coder.config.reads == ("blocks.0.mlp_out_post#1",)
    with pytest.raises(FormatError, match=r"c.pkl: state_dict.W_enc is \[4, 6\], expected \[4, 8\]"):
        load(_pickled(tmp_path / "c.pkl", _Config(**base | {"d_sae": 8})))
    with pytest.raises(FormatError, match="are not supported"):
        load(_pickled(tmp_path / "d.pkl", _Config(**base, activation_fn="tanh-relu")))


def test_nothing_else_is_run(tmp_path):
    _pickled(tmp_path / "a.pkl", _Config(d_in=4, d_sae=6))
    evil = pickle.dumps({"cfg": 0, "state_dict": {"W_enc": 0}}, protocol=0)
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR" + evil)
    with pytest.raises(
        FormatError, match=r"a.pkl: this pickle is refused: it asks for 'os.system', which is not allowed"
    ):
        load(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()


def test_other_peoples_pickles_are_left_to_them(tmp_path):
    torch.save(
        {"cfg": {"d_in": 4}, "state_dict": {"W_enc": torch.ones(2, 2), "W_dec": torch.ones(2, 2)}}, tmp_path / "a.pt"
    )
    with pytest.raises(FormatError, match="no known format"):
        detect(tmp_path / "a.pt")
