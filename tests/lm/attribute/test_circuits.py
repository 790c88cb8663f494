"""Circuits: edges add up by the chain rule, all nodes carry everything, none carries nothing."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.fakes import LinearCoder, topk_coder
from lm.families import some_tokens, tiny
from unmix.core.errors import ConfigError, ModelError
from unmix.lm.attribute import find_circuit, judge_circuit, node_means
from unmix.lm.attribute.circuits import Circuit

TOKENS = some_tokens(2, 4)
EVERY: dict[str, Any] = {"node_threshold": 0.0, "edge_threshold": 0.0, "limit": None, "sizes": (0, 5, 10_000)}


def coders() -> list[Any]:
    return [
        topk_coder("blocks.0.resid_post", 16), topk_coder("blocks.1.mlp_out_post", 16),
        topk_coder("blocks.1.resid_post", 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "error"), [("llama", "keep"), ("gpt2", "keep"), ("gemma2", "keep"), ("llama", "drop")]
)
@pytest.mark.parametrize("positions", ["each", "sum"])
def test_what_a_node_gives_on_adds_up_to_its_effect(family: str, positions: str, error: Any) -> None:
    """dm/du = Σ over nodes d after it of dm/dd · ∂d/∂u with every other node held, + ∂m/∂u: the chain rule."""
    with tiny(family).bind(coders(), error=error) as bound:
        found = find_circuit(bound, TOKENS, 5, method="gradient", positions=positions, **EVERY)
    given = dict.fromkeys((node.id for node in found.nodes), 0.0)
    for edge in found.edges:
        given[edge.source] += edge.weight
    assert len(found.nodes) > 20 and any(node.latent is None for node in found.nodes) == (error == "keep")
    for node in found.nodes:
        assert given[node.id] == pytest.approx(node.effect, abs=2e-4, rel=2e-3), node.id
    order = {name: i for i, name in enumerate(found.layers)}
    by_id = {node.id: node for node in found.nodes}
    for edge in found.edges:
        if edge.target != "metric" and abs(edge.weight) > 1e-6:
            source, target = by_id[edge.source], by_id[edge.target]
            assert order[source.source] < order[target.source]
            assert positions == "sum" or (source.position or 0) <= (target.position or 0)


@pytest.mark.parametrize("error", ["keep", "drop"])
@pytest.mark.parametrize("baseline", ["zero", "corrupt", "mean"])
def test_all_nodes_carry_everything_and_none_carries_nothing(error: Any, baseline: str) -> None:
    lm = tiny("llama")
    options: dict[str, Any] = {}
    with lm.bind(coders(), error=error) as bound:
        if baseline == "corrupt":
            options["corrupt"] = TOKENS.flip(1)
        elif baseline == "mean":
            options["means"] = node_means(bound, some_tokens(3, 4, seed=5))
        found = find_circuit(bound, TOKENS, 5, method="gradient", **{**EVERY, **options, "edge_threshold": math.inf})
        none = find_circuit(bound, TOKENS, 5, method="gradient", **{**EVERY, **options, "node_threshold": 1e9})
        assert judge_circuit(bound, found, TOKENS, 5, **options) == (found.faithfulness, found.completeness)
    assert found.baseline == baseline
    # Nodes of no effect are not listed (they come after what is read), so all is all that matters.
    assert found.faithfulness == pytest.approx(1.0, abs=1e-4) and found.completeness == pytest.approx(0.0, abs=1e-4)
    assert none.nodes == [] and none.edges == [] and found.edges == []
    assert none.faithfulness == pytest.approx(0.0, abs=1e-6) and none.completeness == pytest.approx(1.0, abs=1e-4)
    assert [p.size for p in found.curve] == [0, 5, len(found.nodes)]
    assert found.curve[0].faithfulness == pytest.approx(0.0, abs=1e-6)
    assert found.curve[2].faithfulness == pytest.approx(found.faithfulness)


def test_an_empty_circuit_is_the_model_with_biases_alone() -> None:
    """Zero baselines, errors gone: the activation is the coder's bias; by a plain edit."""
    lm = tiny("gpt2")
    coder = topk_coder("blocks.1.resid_post", 16)
    with torch.no_grad():
        coder.b_dec.copy_(torch.randn(16))
    found = find_circuit((lm, coder), TOKENS, 5, node_threshold=0.5, steps=4, sizes=())
    with torch.no_grad():
        edited = lm.spliced_logits(TOKENS, {"blocks.1.resid_post": coder.b_dec.expand_as})
    assert found.empty == pytest.approx(float(edited[:, -1, 5].mean()), abs=1e-5)
    assert found.value == pytest.approx(float(lm.logits(TOKENS)[:, -1, 5].mean()), abs=1e-5)


def test_keeping_some_nodes_by_hand() -> None:
    """The circuit's latents stay, its errors too, everything else is zero: with one coder, by a plain edit."""
    lm, hook = tiny("llama"), "blocks.1.resid_post"
    coder = topk_coder(hook, 16)
    found = find_circuit((lm, coder), TOKENS[:1], 5, node_threshold=0.25, steps=4, sizes=())
    x = lm.capture(TOKENS[:1], [hook])[hook]
    with torch.no_grad():
        codes = coder.encode(x)
        error = x - coder.decode(codes)
        dense, kept = codes.dense(), torch.zeros_like(x)
        for node in found.nodes:
            if node.latent is None:
                kept[0, node.position] += error[0, node.position]
            else:
                kept[0, node.position] += dense[0, node.position, node.latent] * coder.W_dec[node.latent]
        m = float(lm.spliced_logits(TOKENS[:1], {hook: lambda _: kept + coder.b_dec})[0, -1, 5])
    assert 2 <= len(found.nodes) < 16
    assert found.faithfulness == pytest.approx((m - found.empty) / (found.value - found.empty), abs=1e-4)


def test_thresholds_and_limits() -> None:
    model = (tiny("llama"), coders())
    every = find_circuit(model, TOKENS, 5, method="gradient", **EVERY)
    some = find_circuit(model, TOKENS, 5, method="gradient", node_threshold=0.05, edge_threshold=0.02, sizes=())
    assert [n.id for n in some.nodes] == [n.id for n in every.nodes if abs(n.effect) >= 0.05]
    assert all(abs(edge.weight) >= 0.02 for edge in some.edges)
    known = {(e.source, e.target): e.weight for e in every.edges}
    assert all(edge.weight == pytest.approx(known[edge.source, edge.target], abs=1e-5) for edge in some.edges)
    few = find_circuit(model, TOKENS, 5, method="gradient", node_threshold=0.0, limit=3, sizes=())
    assert [n.id for n in few.nodes] == [n.id for n in every.nodes[:3]]
    assert few.curve == []


def test_transcoders_in_a_circuit() -> None:
    lm = tiny("llama")
    pair = [
        LinearCoder("blocks.0.mlp_in", 16, "blocks.0.mlp_out", name="t0"),
        LinearCoder("blocks.1.mlp_in", 16, "blocks.1.mlp_out", name="t1", seed=2),
    ]
    with lm.bind(pair) as bound:
        found = find_circuit(bound, TOKENS, 5, method="gradient", **EVERY)
    given = dict.fromkeys((node.id for node in found.nodes), 0.0)
    for edge in found.edges:
        given[edge.source] += edge.weight
    assert all(given[node.id] == pytest.approx(node.effect, abs=2e-4, rel=2e-3) for node in found.nodes)
    assert any(e.source.startswith("t0/") and e.target.startswith("t1/") for e in found.edges)
    assert found.layers == ["t0", "blocks.0.mlp_out", "t1", "blocks.1.mlp_out"]


def test_a_circuit_as_json_and_as_a_picture(tmp_path: Path) -> None:
    found = find_circuit((tiny("llama"), coders()), TOKENS, 5, method="gradient", node_threshold=0.02)
    found.to_json(tmp_path / "c.json")
    tree = json.loads((tmp_path / "c.json").read_text())
    assert tree["schema"] == "unmix-circuit-1" and len(tree["nodes"]) == len(found.nodes)
    ids = {node["id"] for node in tree["nodes"]} | {"metric"}
    assert {e["source"] for e in tree["edges"]} | {e["target"] for e in tree["edges"]} <= ids
    for text in (found.to_svg(tmp_path / "c.svg"), found.curve_svg(tmp_path / "k.svg")):
        ET.fromstring(text)
    picture = (tmp_path / "c.svg").read_text()
    assert picture.count("<circle") == sum(node.latent is not None for node in found.nodes)
    assert picture == found._repr_svg_()
    sizes = [p.size for p in found.curve]
    assert sizes[:4] == [0, 1, 2, 4] and sizes[-1] > len(found.nodes)
    assert all(math.isfinite(p.faithfulness) for p in found.curve)


def test_an_empty_picture_and_hostile_tokens() -> None:
    empty = Circuit([], [], "logit of '<script>'", 1.0, 0.0, 0.0, 1.0, [], "each", "zero", [["<b>"]], [])
    ET.fromstring(empty.to_svg())
    assert "<script>" not in empty.to_svg() and "<script>" not in empty.curve_svg()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "patch"}, "circuits take 'ig' or 'gradient'"),
        ({"positions": "all"}, "positions is 'all'; allowed: each, sum"),
        ({"sizes": (-1,)}, "sizes: -1 is no number of nodes"),
        ({"limit": 0}, "limit must be at least 1, found 0"),
        ({"target": 1000}, "token id 1000"),
    ],
)
def test_circuits_that_cannot_be_found(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=says):
        find_circuit((tiny("llama"), coders()), TOKENS, **{"target": 5, "method": "gradient", **options})


def test_a_circuit_of_positions_is_judged_on_prompts_of_its_length() -> None:
    model = (tiny("llama"), coders())
    found = find_circuit(model, TOKENS, 5, method="gradient", node_threshold=0.05, sizes=())
    with pytest.raises(ConfigError, match="the circuit is of 4 positions, the prompts have 3 tokens"):
        judge_circuit(model, found, TOKENS[:, :3], 5)
    summed = find_circuit(model, TOKENS, 5, method="gradient", node_threshold=0.05, sizes=(), positions="sum")
    assert all(node.position is None for node in summed.nodes)
    faithfulness, _ = judge_circuit(model, summed, TOKENS[:, :3], 5)
    assert math.isfinite(faithfulness)
