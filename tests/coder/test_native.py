"""The native folder: bit-equal on the way back, whole or absent, and clear about what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmix.coder.native import CONFIG, WEIGHTS, load_native, read_native_config, save_native
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, CorruptError, FormatError, MachineError, NonFiniteError
from unmix.core.manifest import MANIFEST, write_manifest

from .makers import ACTIVATIONS, make_coder, make_input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved coder with every kind of tensor."""
    coder = make_coder("jumprelu", 4, 6, d_out=5, pre_bias="own", skip=True, training={"note": "é"})
    coder.save(tmp_path / "coder")
    return tmp_path / "coder"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Weights, config, hash and dtype; in evaluation mode."""
    coder = make_coder(name, 4, 6, 2, skip=True, pre_bias="own", normalise={"kind": "layer_norm"}).to(dtype)
    save_native(coder, tmp_path / "coder")
    again = load_native(tmp_path / "coder")
    assert again.config == coder.config
    assert again.state_dict().keys() == coder.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in coder.state_dict().items())
    assert again.hash() == coder.hash()
    assert again.dtype == dtype
    assert not again.training
    x = make_input(20, 4, "normal").to(dtype)
    with torch.no_grad():
        assert torch.equal(again(x).reconstruction, coder.eval()(x).reconstruction)


def test_strided_weights_are_saved_by_value(tmp_path: Path) -> None:
    """A transposed view of a foreign file's tensor."""
    coder = make_coder("relu", 4, 6)
    coder.W_enc = torch.nn.Parameter(torch.arange(24.0, dtype=torch.float64).reshape(4, 6).T)
    coder.save(tmp_path / "coder")
    assert torch.equal(load_native(tmp_path / "coder").W_enc, coder.W_enc)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_never_written(folder: Path, bad: float) -> None:
    """Nothing at all is: the older coder stays."""
    before = load_native(folder).hash()
    coder = make_coder("topk-after", 4, 6, 2)
    with torch.no_grad():
        coder.b_enc[3] = bad
    with pytest.raises(NonFiniteError, match=r"^input: b_enc holds NaN or infinity; nothing was saved$"):
        coder.save(folder)
    with pytest.raises(NonFiniteError):
        coder.save(folder.parent / "other")
    assert load_native(folder).hash() == before
    assert [p.name for p in folder.parent.iterdir()] == ["coder"]


def test_an_older_coder_is_replaced_whole(folder: Path) -> None:
    """By one of another shape, and by nothing when the disk is full."""
    make_coder("topk-after", 3, 7, 2).save(folder)
    assert load_native(folder).config.n_latents == 7


def test_a_full_disk_leaves_the_older_coder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the folder."""
    before = load_native(folder).hash()

    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match=r"coder.*: the disk is full$"):
        make_coder("topk-after", 4, 6, 2).save(folder)
    monkeypatch.undo()
    assert load_native(folder).hash() == before
    assert [p.name for p in folder.parent.iterdir()] == ["coder"]


def test_somebody_elses_folder_is_not_replaced(tmp_path: Path, folder: Path) -> None:
    """Saving into a folder of other things would delete them."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis: is not empty and holds no coder .*choose another folder$"):
        make_coder("relu", 4, 6).save(tmp_path / "thesis")
    (folder / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"coder: holds 'notes\.txt', which is not part of the coder"):
        make_coder("relu", 4, 6).save(folder)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: is a file, expected a folder$"):
        make_coder("relu", 4, 6).save(tmp_path / "file")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_damage_is_found(folder: Path, name: str) -> None:
    """A flipped bit, and a file cut short."""
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damaged in (bytes(flipped), whole[:-1]):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CorruptError, match=rf"^corrupt coder folder: .*{name}: found "):
            load_native(folder)


def test_damage_is_found_without_a_manifest_too(folder: Path) -> None:
    """As far as a file's own structure tells."""
    (folder / MANIFEST).unlink()
    load_native(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(CorruptError, match=r"coder\.safetensors: cannot be read"):
        load_native(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CorruptError, match=r"coder\.safetensors: cannot be read"):
        load_native(folder)


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Change the tensors of a saved coder, manifest included."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / WEIGHTS)
    write_manifest(folder, "coder")


ALL = "W_dec, W_enc, W_skip, b_dec, b_enc, b_pre, threshold"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": torch.zeros(5, 6)}, r"W_dec is \[5, 6\], expected \[6, 5\] \(d_in=4, d_out=5, n_latents=6\)$"),
        ({"threshold": None}, rf"tensor threshold is missing; expected {ALL}$"),
        ({"bonus": torch.zeros(1)}, rf"tensor bonus is unknown; expected {ALL}$"),
        ({"b_enc": torch.zeros(6)}, r"tensors are float32, float64, expected one floating-point dtype$"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    """Named with what was found and what is expected."""
    rewrite(folder, changes)
    with pytest.raises(FormatError, match=rf"^{folder / WEIGHTS}: {message}"):
        load_native(folder)


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    """Every tensor an integer."""
    rewrite(folder, {name: t.long() for name, t in load_file(folder / WEIGHTS).items()})
    with pytest.raises(FormatError, match=r"tensors are int64, expected one floating-point dtype$"):
        load_native(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "unmix-2"}, r"config\.json: format 'unmix-2', this version reads 'unmix-1'$"),
        ({"format": None}, r"config\.json: not a native coder config \(no field 'format'\)$"),
        ({"d_in": None}, r"config\.json: d_in: missing$"),
        ({"colour": "red"}, r"config\.json: unknown field 'colour'"),
    ],
)
def test_configs_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    """Of the future, of something else, incomplete."""
    tree = {**json.loads((folder / CONFIG).read_text(encoding="utf-8")), **changes}
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in tree.items() if v is not None}), encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        read_native_config(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_json(folder: Path, text: str) -> None:
    """And no folder at all."""
    (folder / CONFIG).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FormatError, match=r"config\.json: "):
        read_native_config(folder)
    with pytest.raises(FormatError, match=r"nowhere/config\.json: cannot be read as a coder's config"):
        load_native(folder / "nowhere")


def test_a_loaded_coder_is_on_its_own(folder: Path) -> None:
    """Weights are not a view of the file: training a loaded coder does not touch it."""
    coder = load_native(folder)
    assert isinstance(coder, SparseCoder)
    with torch.no_grad():
        coder.W_dec.zero_()
    assert load_native(folder).W_dec.any()
