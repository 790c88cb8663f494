"""circuit-tracer's cross-layer transcoders, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from formats.scope_makers import D, F, close, inputs, jump, normal, put, thresholds, weights
from unmix.coder import CoderConfig, CoderSet, SparseCoder
from unmix.coder.config import JumpReLU, ReLU
from unmix.core.errors import FormatError
from unmix.formats import convert, detect, load_all
from unmix.formats.draft import Draft
from unmix.formats.layouts.circuit_tracer_clt import CircuitTracerCltFormat

N = 3
CONFIG = {
    "model_name": "google/gemma-2-2b", "model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid",
    "feature_output_hook": "hook_mlp_out",
}  # fmt: skip


def folder(path: Path, jumps: bool = True, config: dict[str, Any] | None = CONFIG) -> list[dict[str, Tensor]]:
    layers: list[dict[str, Tensor]] = []
    for i in range(N):
        w = weights(seed=10 * i)
        own = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
        own |= {"threshold": thresholds()} if jumps else {}
        put(path / f"W_enc_{i}.safetensors", {f"{k}_{i}": v for k, v in own.items()})
        own["W_dec"] = normal(F, N - i, D, seed=10 * i + 5)
        put(path / f"W_dec_{i}.safetensors", {f"W_dec_{i}": own["W_dec"]})
        layers.append(own)
    if config is not None:
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    return layers


def x_of(hook: str = "resid_mid") -> dict[str, Tensor]:
    return {f"blocks.{i}.{hook}": inputs(seed=i) for i in range(N)}


@torch.no_grad()
def outputs(coders: CoderSet, x: dict[str, Tensor]) -> dict[str, Tensor]:
    return coders.decode(coders.encode(x))


@torch.no_grad()
@pytest.mark.parametrize("jumps", [True, False])
def test_the_outputs_of_all_layers(tmp_path, jumps):
    layers = folder(tmp_path, jumps)
    coders = load_all(tmp_path)
    assert detect(tmp_path) == "circuit_tracer_clt"
    assert isinstance(coders, CoderSet) and list(coders) == ["layer_0", "layer_1", "layer_2"]
    x = x_of()
    z = [x[f"blocks.{i}.resid_mid"] @ w["W_enc"].T + w["b_enc"] for i, w in enumerate(layers)]
    f = [jump(own, thresholds()) if jumps else own.relu() for own in z]
    written = outputs(coders, x)
    for j, own in enumerate(layers):
        expected = sum(f[i] @ layers[i]["W_dec"][:, j - i] for i in range(j + 1)) + own["b_dec"]
        assert close(written[f"blocks.{j}.mlp_out_post"], expected)


def test_there_and_back(tmp_path):
    folder(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "circuit_tracer_clt")
    a, b = load_all(tmp_path / "a"), load_all(tmp_path / "b")
    for name, coder in a.items():
        for key, tensor in coder.state_dict().items():
            assert torch.equal(tensor, b[name].state_dict()[key])
        assert coder.config.writes == b[name].config.writes


def coder(i: int, **fields: Any) -> SparseCoder:
    tree = {"reads": (f"blocks.{i}.mlp_in",), "writes": tuple(f"blocks.{j}.mlp_out" for j in range(i, N)), "d_in": D,
            "d_out": D * (N - i), "n_latents": F, "activation": JumpReLU(), "pre_bias": "none"} | fields  # fmt: skip
    made = SparseCoder(CoderConfig(**tree)).eval()
    with torch.no_grad():
        for s, (name, parameter) in enumerate(made.named_parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 * i + s))
            if name == "threshold":
                parameter.abs_()
    return made


def written(folder: Path, *coders: SparseCoder) -> Path:
    folder.mkdir()
    CircuitTracerCltFormat().write({str(i): Draft.of(c) for i, c in enumerate(coders)}, folder)
    return folder


@pytest.mark.parametrize("fields", [{}, {"input_scale": 0.5, "output_scale": 2.0, "gate_space": "decoder_norm_sum"}])
def test_written_sets_compute_the_same(tmp_path, fields):
    # Every coder has a bias on each layer it writes, and one is a relu: the layout keeps the sums, and θ = 0.
    own = CoderSet({str(i): coder(i, **fields, **({"activation": ReLU()} if i == 1 else {})) for i in range(N)})
    again = load_all(written(tmp_path / "out", *own.values()))
    assert isinstance(again, CoderSet)
    x = x_of("mlp_in")
    expected, found = outputs(own, x), outputs(again, x)
    assert all(close(found[hook], expected[hook]) for hook in expected) and len(found) == N
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")


def test_what_the_layout_has_no_field_for(tmp_path):
    with pytest.raises(FormatError, match="of 2 layers, layer 0 reads block 0 and writes it and all that follow"):
        written(tmp_path / "a", coder(1), coder(2))
    with pytest.raises(FormatError, match="with a skip matrix: of 3 layers"):
        written(tmp_path / "b", coder(0, skip=True), coder(1), coder(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_kind": "transcoder_set"}, "config.yaml: model_kind is 'transcoder_set'. "),
        ({"feature_output_hook": 3}, "feature_output_hook is 3, expected a string"),
    ],
)
def test_settings_that_cannot_be_kept(tmp_path, changes, message):
    folder(tmp_path, config=CONFIG | changes)
    with pytest.raises(FormatError) as caught:
        load_all(tmp_path)
    assert message in str(caught.value)


def test_what_is_missing(tmp_path):
    folder(tmp_path / "a", config=None)
    with pytest.raises(FormatError, match=r"config.yaml is not plain YAML|config\.yaml"):
        load_all(tmp_path / "a")
    folder(tmp_path / "b")
    (tmp_path / "b" / "W_enc_1.safetensors").unlink()
    with pytest.raises(FormatError, match="W_enc files of the layers 0, 2, expected 0, 1, …"):
        load_all(tmp_path / "b")
    folder(tmp_path / "c")
    put(tmp_path / "c" / "W_dec_1.safetensors", {"W_dec_1": torch.ones(F, N, D)})
    with pytest.raises(FormatError, match=r"W_dec_1 is \[20, 3, 6\], expected \[20, 2, 6\] \(.*layers=2 from W_enc_1"):
        load_all(tmp_path / "c")
