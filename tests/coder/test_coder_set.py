"""Coders whose writes add up: by hand, saved and loaded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unmix.coder.coder_set import CoderSet, load_set
from unmix.coder.config import CoderConfig, ReLU
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, CorruptError, FormatError


def layer(i: int, n_layers: int = 3, d: int = 4, seed: int = 0) -> SparseCoder:
    """Reads layer i, writes every layer from i on."""
    later = range(i, n_layers)
    config = CoderConfig(
        name=f"layer-{i}", reads=(f"blocks.{i}.mlp_in",), writes=tuple(f"blocks.{j}.mlp_out" for j in later),
        d_in=d, d_out=d * len(later), n_latents=6, activation=ReLU(), pre_bias="none",
    )  # fmt: skip
    coder = SparseCoder(config, seed=seed + i).eval()
    torch.nn.init.normal_(coder.b_dec, generator=torch.Generator().manual_seed(i))
    return coder


def test_writes_to_one_hook_add_up() -> None:
    """Layer 2 gets the last part of every coder's output."""
    coders = CoderSet({f"layer-{i}": layer(i) for i in range(3)})
    inputs = {f"blocks.{i}.mlp_in": torch.randn(2, 5, 4) for i in range(3)}
    codes = coders.encode(inputs)
    out = coders.decode(codes)
    expected = torch.zeros(2, 5, 4)
    for i in range(3):
        coder = coders[f"layer-{i}"]
        f = (inputs[f"blocks.{i}.mlp_in"] @ coder.W_enc.T + coder.b_enc).relu()
        expected += (f @ coder.W_dec + coder.b_dec)[..., -4:]
    torch.testing.assert_close(out["blocks.2.mlp_out"], expected)
    assert list(out) == ["blocks.0.mlp_out", "blocks.1.mlp_out", "blocks.2.mlp_out"]
    # Some coders alone write what they write.
    alone = coders.decode({"layer-2": codes["layer-2"]})
    assert list(alone) == ["blocks.2.mlp_out"]
    assert repr(coders).startswith("CoderSet(3 coders, reads blocks.0.mlp_in, blocks.1.mlp_in")


def test_saved_and_loaded(tmp_path: Path) -> None:
    """Every tensor comes back; an older set is replaced, anything else is not."""
    coders = CoderSet({f"layer-{i}": layer(i) for i in range(3)})
    coders.save(tmp_path / "set")
    coders.save(tmp_path / "set")
    back = load_set(tmp_path / "set")
    assert list(back) == list(coders)
    assert all(back[name].hash() == coders[name].hash() for name in coders)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds no coder-set"):
        coders.save(tmp_path / "other")


def test_what_is_refused(tmp_path: Path) -> None:
    """No coders, a missing input, parts that cannot add up, a manifest that leads out, a missing folder."""
    with pytest.raises(ConfigError, match="at least one coder"):
        CoderSet({})
    with pytest.raises(ConfigError, match=r"layer-0 writes 8 values to blocks\.2\.mlp_out, layer-2 writes 4"):
        CoderSet({"layer-2": layer(2), "layer-0": layer(0, d=8)})
    coders = CoderSet({"layer-2": layer(2)})
    with pytest.raises(ConfigError, match=r"no input for blocks\.2\.mlp_in; this set reads blocks\.2\.mlp_in"):
        coders.encode({})
    coders.save(tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "coders": ["../x"]}))
    with pytest.raises(FormatError, match=r"lists a coder '\.\./x', which is no folder's name"):
        load_set(tmp_path / "set")
    with pytest.raises(CorruptError, match="missing"):
        load_set(tmp_path / "absent")
