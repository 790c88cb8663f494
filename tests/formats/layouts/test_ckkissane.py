"""ckkissane's crosscoders of two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from formats.scope_makers import D, F, close, normal, run
from unmix.core.errors import FormatError
from unmix.formats import detect, load


def stored() -> dict[str, Tensor]:
    return {"W_enc": normal(2, D, F), "b_enc": normal(F, seed=1), "W_dec": normal(F, 2, D, seed=2),
            "b_dec": normal(2, D, seed=3)}  # fmt: skip


def folder(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    path.mkdir()
    torch.save(tensors or stored(), path / "cc_weights.pt")
    tree = {"d_in": D, "dict_size": F, "hook_point": "blocks.14.hook_resid_pre", "model_name": "gemma-2-2b", "lr": 1e-4}
    (path / "cfg.json").write_text(json.dumps(tree | changes))
    return path


def test_both_models_side_by_side(tmp_path):
    w, x = stored(), normal(16, 2, D, seed=9)
    place = folder(tmp_path / "a")
    coder = load(place)
    codes, recon = run(coder, x.flatten(1))
    expected = (torch.einsum("nmd,mdf->nf", x, w["W_enc"]) + w["b_enc"]).relu()
    assert close(codes, expected)
    assert close(recon, (torch.einsum("nf,fmd->nmd", expected, w["W_dec"]) + w["b_dec"]).flatten(1))
    assert detect(place) == "ckkissane" and coder.config.parts() == (D, D)
    assert coder.config.reads == ("model_0:blocks.14.resid_pre", "model_1:blocks.14.resid_pre")
    assert coder.config.training["ckkissane"]["model_name"] == "gemma-2-2b"


def test_what_does_not_fit(tmp_path):
    with pytest.raises(
        FormatError, match=r"W_enc is \[2, 6, 20\], expected \[2, 6, 19\] \(.*dict_size=19 from cfg.json"
    ):
        load(folder(tmp_path / "a", dict_size=19))
    with pytest.raises(FormatError, match=r"W_dec is \[20, 3, 6\], expected \[20, 2, 6\]"):
        load(folder(tmp_path / "b", stored() | {"W_dec": torch.ones(F, 3, D)}))
    with pytest.raises(FormatError, match=r"cfg\.json: hook_point is 14, expected a string"):
        load(folder(tmp_path / "c", hook_point=14))
