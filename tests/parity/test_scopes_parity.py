"""Scope families: what `make_gemma_scope`, `make_openmoss`, `make_circuit_tracer`, … recorded, through `load`.

Codes and outputs to 1e-5 of their largest value, whichever way the checkpoint is written.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmix.coder import CoderSet, SparseCoder
from unmix.formats import load, load_all

HERE = Path(__file__).resolve().parent
PEERS = (
    "gemma_scope", "gemma_scope_2", "gemma_scope_2_clt", "gemma_scope_2_crosscoder", "llama_scope", "llama_scope_r1",
    "llamascopium", "circuit_tracer", "circuit_tracer_clt", "ckkissane", "qwen_scope",
)  # fmt: skip
FIXTURES = [folder for peer in PEERS for folder in sorted((HERE / peer).iterdir()) if folder.is_dir()]
SINGLE = [f for f in FIXTURES if "x" in load_file(f / "expected.safetensors")]
SEVERAL = [f for f in FIXTURES if f not in SINGLE]


def ids(folders: list[Path]) -> list[str]:
    return [f"{folder.parent.name}-{folder.name}" for folder in folders]


def place_of(folder: Path) -> Path:
    return folder / json.loads((folder / "recorded.json").read_text())["place"]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def run(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    codes = coder.encode(x)
    return codes.dense(), coder.decode(codes)


def test_every_fixture_is_walked():
    assert len(SINGLE) == 23 and len(SEVERAL) == 11


@pytest.mark.parametrize("folder", SINGLE, ids=ids(SINGLE))
def test_recorded_codes_and_outputs(folder):
    expected = load_file(folder / "expected.safetensors")
    # The peer's batch top-k ranks over the batch at inference too, and publishes no threshold.
    coder = load(place_of(folder)).train(folder.name == "batchtopk")
    acts, recon = run(coder, expected["x"])
    close(acts, expected["acts"])
    close(recon, expected["recon"])
    if "acts_folded" in expected:
        close(acts * expected["unit"], expected["acts_folded"])


@pytest.mark.parametrize("folder", SEVERAL, ids=ids(SEVERAL))
@torch.no_grad()
def test_recorded_codes_and_outputs_of_several(folder):
    expected = load_file(folder / "expected.safetensors")
    coders = load_all(place_of(folder))
    layers = {name: re.sub(r"\D+", "", name) for name in coders}
    assert sorted(layers.values()) == sorted(key.removeprefix("x.") for key in expected if key.startswith("x."))
    for name, layer in layers.items():
        close(coders[name].encode(expected[f"x.{layer}"]).dense(), expected[f"acts.{layer}"])
    if not isinstance(coders, CoderSet):
        for name, layer in layers.items():
            close(run(coders[name], expected[f"x.{layer}"])[1], expected[f"recon.{layer}"])
        return
    codes = coders.encode({coders[name].config.reads[0]: expected[f"x.{layer}"] for name, layer in layers.items()})
    written = coders.decode(codes)
    assert len(written) == len(layers)
    for hook, output in written.items():
        close(output, expected[f"recon.{hook.split('.')[1]}"])


def test_cross_layer_coders_are_sets():
    joint = {folder.parent.name for folder in SEVERAL if isinstance(load_all(place_of(folder)), CoderSet)}
    assert joint == {"gemma_scope_2_clt", "gemma_scope_2_crosscoder", "circuit_tracer_clt"}
