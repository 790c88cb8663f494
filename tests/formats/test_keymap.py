"""Declarative key maps: every tensor is accounted for on the header, before data is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unmix.core.errors import FormatError, NonFiniteError
from unmix.formats.keymap import Found, Stored, read_state, write_state
from unmix.formats.place import Place

MAP = (
    Stored("enc", "W_enc", ("d", "F"), "transpose"),
    Stored("b", "b_enc", ("F",)),
    Stored("theta", "threshold", ("F",)),
    Stored("log_theta", "threshold", ("F",), "exp"),
    Stored("skip", "W_skip", ("d", "d"), optional=True),
    Stored("count", "count", ("F",), kind="statistic"),
    Stored("step", "step", (), kind="ignored"),
)
SIZES = {"d": 2, "F": 3}


def tensors() -> dict[str, torch.Tensor]:
    """What the map expects."""
    return {"enc": torch.randn(2, 3), "b": torch.randn(3), "theta": torch.rand(3)}


def read(folder: Path, stored: dict[str, torch.Tensor], sizes: dict[str, int] | None = SIZES) -> Found:
    """Save and read back."""
    save_file(stored, folder / "w.safetensors")
    return read_state(Place(folder), "w.safetensors", MAP, sizes, source="cfg.json")


def test_weights_come_latent_major_in_float32(tmp_path: Path) -> None:
    """Through their transforms; half precision is widened, statistics and integers stay as they are."""
    stored = {**tensors(), "count": torch.tensor([1, 2, 3]), "step": torch.tensor(5)}
    found = read(tmp_path, {**stored, "b": stored["b"].half()})
    assert set(found.state) == {"W_enc", "b_enc", "threshold"}
    assert torch.equal(found.state["W_enc"](), stored["enc"].T)
    assert found.state["b_enc"]().dtype == torch.float32
    assert found.statistics["count"]().tolist() == [1, 2, 3]
    assert {k: v.shape for k, v in found.state.items()} == {"W_enc": (3, 2), "b_enc": (3,), "threshold": (3,)}


def test_alternatives_and_their_way_back(tmp_path: Path) -> None:
    """log_theta is exp'd on reading; writing takes the first alternative and leaves optional ones out."""
    stored = tensors()
    stored["log_theta"] = stored.pop("theta").log()
    found = read(tmp_path, stored)
    torch.testing.assert_close(found.state["threshold"](), stored["log_theta"].exp())
    written = write_state(found.state, MAP)
    assert list(written) == ["enc", "b", "theta"]
    assert torch.equal(written["enc"](), stored["enc"])


def test_sizes_nobody_said_come_from_the_first_tensor_that_has_them(tmp_path: Path) -> None:
    assert read(tmp_path, tensors(), None).sizes == {"d": 2, "F": 3}
    with pytest.raises(FormatError, match=r"w\.safetensors: b is \[4\], expected \[3\] \(F=3 from enc\)"):
        read(tmp_path, {**tensors(), "b": torch.randn(4)}, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.randn(4)}, r"b is \[4\], expected \[3\] \(F=3 from cfg\.json\)"),
        ({"enc": torch.randn(2)}, r"enc is \[2\], expected \[2, 3\] \(d=2 from cfg\.json; F=3 from cfg\.json\)"),
        ({"b": torch.arange(3)}, r"b is int64, expected one of float64, float32, float16, bfloat16"),
        ({"b": None}, r"b is missing; found enc, theta"),
        ({"theta": None}, r"theta or log_theta is missing; found b, enc"),
        ({"log_theta": torch.rand(3)}, r"theta or log_theta are both there, expected one"),
        ({"extra": torch.rand(3)}, r"unknown tensor extra; expected enc, b, theta, log_theta, skip, count, step"),
        ({"skip": torch.rand(2, 3)}, r"skip is \[2, 3\], expected \[2, 2\] \(d=2 from cfg\.json\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    stored = {k: v for k, v in {**tensors(), **change}.items() if v is not None}
    with pytest.raises(FormatError, match=rf"^{tmp_path}: w\.safetensors: {message}"):
        read(tmp_path, stored)


def test_nan_is_found_when_the_tensor_is_made(tmp_path: Path) -> None:
    stored = tensors()
    stored["b"][1] = torch.nan
    found = read(tmp_path, stored)
    found.state["W_enc"]()
    with pytest.raises(NonFiniteError, match=r"w\.safetensors: b holds NaN or infinity"):
        found.state["b_enc"]()


def test_one_key_in_two_layouts_is_told_by_its_shape(tmp_path: Path) -> None:
    """[F, d] or [d, F]: by shape; where F = d nobody can tell."""
    two = (Stored("W", "W_dec", ("F", "d")), Stored("W", "W_dec", ("d", "F"), "transpose"))
    weight = torch.randn(2, 3)
    save_file({"W": weight}, tmp_path / "w.safetensors")
    found = read_state(Place(tmp_path), "w.safetensors", two, SIZES)
    assert torch.equal(found.state["W_dec"](), weight.T)
    save_file({"W": torch.randn(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(FormatError, match=r"W is \[3, 3\], which can be \[F, d\] or \[d, F\]"):
        read_state(Place(tmp_path), "w.safetensors", two, {"F": 3, "d": 3})
    with pytest.raises(FormatError, match=r"W is \[3, 3\], expected \[3, 2\] \(F=3 from the config; d=2 from"):
        read_state(Place(tmp_path), "w.safetensors", two, SIZES)


def test_a_prefix_picks_one_coder_of_several(tmp_path: Path) -> None:
    stored = {f"{name}.{k}": v for name in ("one", "two") for k, v in tensors().items()}
    save_file(stored, tmp_path / "w.safetensors")
    found = read_state(Place(tmp_path), "w.safetensors", MAP, prefix="two.", whole=False)
    assert torch.equal(found.state["b_enc"](), stored["two.b"])
    with pytest.raises(FormatError, match=r"unknown tensor one\.b, one\.enc, one\.theta; expected two\.enc"):
        read_state(Place(tmp_path), "w.safetensors", MAP, prefix="two.")
