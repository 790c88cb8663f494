"""Every recorded kind of SAELens, of every generation: codes and outputs are the peer's own to 1e-5.

`sae_lens/<kind>/` was written by `make_sae_lens.py` and `make_sae_lens_legacy.py`, which run the peer.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmix.coder.sparse_coder import SparseCoder
from unmix.formats import detect, load, load_all

ROOT = Path(__file__).parent / "sae_lens"
KINDS = sorted(p.name for p in ROOT.iterdir() if (p / "expected.safetensors").is_file())


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@torch.no_grad()
def run(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    codes = coder.encode(x)
    codes.check()
    return codes.dense(), coder.decode(codes)


def expected_of(kind: str) -> dict[str, Tensor]:
    return load_file(ROOT / kind / "expected.safetensors")


def format_of(kind: str) -> str:
    if kind.startswith("mats") or kind.endswith("pickle"):
        return "mats_sae_training"
    return "sae_lens_legacy" if kind[0] == "v" else "sae_lens"


def test_nothing_is_left_unrecorded():
    assert len(KINDS) == 52
    for kind in KINDS:
        told = json.loads((ROOT / kind / "recorded.json").read_text())
        assert {"peer", "version", "torch", "command", "own_code"} <= told.keys() and told["own_code"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_the_peers_own_numbers(kind):
    place, expected = ROOT / kind, expected_of(kind)
    assert detect(place) == format_of(kind)
    for name, coder in load_all(place).items():
        member = f"{list(load_all(place)).index(name)}." if "1.acts" in expected else ""
        acts, recon = run(coder, expected["x"])
        # A batch top-k checkpoint evaluates as the peer exports it: by its threshold.
        before = "inference_" if "inference_acts" in expected else member
        # The peer's decode leaves out the skip and what was predicted; its forward pass adds both.
        out = expected.get("forward", expected[f"{before}recon"])
        assert close(acts, expected[f"{before}acts"])
        assert close(recon, out)


@pytest.mark.parametrize("kind", [k for k in KINDS if "batchtopk_training" in k])
def test_batch_selection_while_training(kind):
    expected = expected_of(kind)
    acts, recon = run(load(ROOT / kind).train(), expected["x"])
    assert close(acts, expected["acts"]) and close(recon, expected["recon"])


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("temporal")])
def test_novel_codes_alone(kind):
    expected = expected_of(kind)
    coder = load(ROOT / kind)
    codes = coder.encode(expected["x"])
    alone = torch.zeros_like(codes.context["predicted"])
    with torch.no_grad():
        decoded = coder.decode_raw(codes.indices, codes.values, codes.offsets, predicted=alone.flatten(0, 1))
    assert close(decoded.view(expected["recon"].shape), expected["recon"])


def test_the_shared_fixtures(shared):
    for place in sorted((shared / "parity" / "sae_lens").iterdir()):
        expected = load_file(place / "expected.safetensors")
        coder = load(place).train("training" in place.name)
        acts, recon = run(coder, expected["x"])
        assert close(acts, expected["acts"]), place.name
        assert close(recon, expected["recon"]), place.name
