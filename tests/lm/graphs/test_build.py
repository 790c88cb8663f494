from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from lm.families import some_tokens, tiny
from lm.graphs.parts import linear_model, transcoder, without_biases
from unmix.core.errors import ConfigError, CorruptError, FormatError, ModelError
from unmix.lm.graphs import AttributionGraph, Edge, LocalReplacement, Node, attribution_graph
from unmix.lm.graphs.heads import attention_causes, heads, patterns
from unmix.lm.graphs.measure import _copies, measured, target_of

TOKENS = some_tokens(1, 9)[0]
CODERS = [transcoder(layer) for layer in range(3)]


@pytest.fixture(scope="module")
def whole() -> AttributionGraph:
    return attribution_graph(tiny("llama"), CODERS, TOKENS, max_latents=10_000)


def test_a_whole_graph_holds_every_effect(whole: AttributionGraph) -> None:
    replacement = LocalReplacement(tiny("llama"), CODERS, TOKENS)
    assert whole.unexpanded == pytest.approx(0, abs=1e-12)
    assert whole.dropped < 1e-3
    latents = [i for i, node in enumerate(whole.nodes) if node.kind == "latent"]
    rows = replacement.rows([target_of(replacement, whole.nodes[i]) for i in latents])
    sizes = rows.abs().sum(1)
    matrix = np.abs(whole.matrix()[latents]).sum(1)
    np.testing.assert_allclose(matrix, sizes.numpy(), rtol=2e-3, atol=1e-5)


def test_influence_is_what_the_finished_matrix_says(whole: AttributionGraph) -> None:
    weight = np.array([node.probability for node in whole.nodes])
    sizes = np.abs(whole.matrix())
    total = sizes.sum(1, keepdims=True)
    shares = np.divide(sizes, total, out=np.zeros_like(sizes), where=total > 0)
    # w(S + S² + …)
    expected = (weight @ np.linalg.inv(np.eye(len(weight)) - shares) - weight) / weight.sum()
    found = np.array([node.influence for node in whole.nodes])
    inner = np.array([node.kind != "logit" for node in whole.nodes])
    np.testing.assert_allclose(found[inner], expected[inner], rtol=0.01, atol=1e-4)


def test_logits_are_the_likeliest_tokens_less_the_mean(whole: AttributionGraph) -> None:
    logits = tiny("llama").logits(TOKENS.unsqueeze(0))[0, -1]
    shown = [node for node in whole.nodes if node.kind == "logit"]
    assert [node.latent for node in shown] == logits.topk(len(shown)).indices.tolist()
    assert len(shown) == 10
    for node in shown:
        assert node.activation == pytest.approx(float(logits[node.latent] - logits.mean()), rel=1e-4)
        assert node.probability == pytest.approx(float(logits.softmax(-1)[node.latent]), rel=1e-4)


def test_targets_and_a_contrast_are_the_callers(whole: AttributionGraph) -> None:
    lm = without_biases("llama")
    graph = attribution_graph(lm, CODERS, TOKENS, targets=[7], against=9, max_latents=5)
    (node,) = [node for node in graph.nodes if node.kind == "logit"]
    logits = lm.logits(TOKENS.unsqueeze(0))[0, -1]
    assert node.latent == 7
    assert node.activation == pytest.approx(float(logits[7] - logits[9]), rel=1e-3)
    assert sum(n.kind == "latent" for n in graph.nodes) == 5
    assert 0 < graph.unexpanded < 1


def test_the_most_influential_latents_are_worked_out_first(whole: AttributionGraph) -> None:
    few = attribution_graph(tiny("llama"), CODERS, TOKENS, max_latents=6, batch=1)
    ranked = sorted((n for n in whole.nodes if n.kind == "latent"), key=lambda n: -n.influence)
    chosen = {n.id for n in few.nodes if n.kind == "latent"}
    assert len(chosen & {n.id for n in ranked[:10]}) >= 5
    assert {n.id for n in few.nodes if n.kind == "embedding"} == {n.id for n in whole.nodes if n.kind == "embedding"}


def chain() -> AttributionGraph:
    """token → latent → logit, with an error beside the latent."""
    nodes = (
        Node("embedding", -1, 0, 4, token="a"),
        Node("error", 0, 0, -1),
        Node("latent", 1, 0, 3, "l1", activation=2.0),
        Node("logit", 2, 0, 8, token="b", probability=0.5),
    )
    return AttributionGraph(
        "a", ("a",), "m", 2, nodes, (Edge(0, 2, 3.0), Edge(1, 2, -1.0), Edge(2, 3, 1.0), Edge(1, 3, 1.0))
    )


def test_scores_of_a_graph_worked_by_hand() -> None:
    # Into the logit: half by the latent, half by the error; into the latent three quarters by the token.
    scores = chain().scores()
    assert scores["replacement"] == pytest.approx(0.375)
    # Weights: logit 0.5 (half known), latent 0.25 (three quarters), token and error (without causes: known).
    carried = {"logit": 0.5 * 0.5, "latent": 0.25 * 0.75, "token": 0.1875, "error": 0.3125}
    assert scores["completeness"] == pytest.approx(sum(carried.values()) / (0.5 + 0.25 + 0.1875 + 0.3125))


def test_pruning_keeps_the_shares_asked_for_and_the_ends() -> None:
    graph = chain()
    assert graph.prune(1, 1) == graph
    small = graph.prune(0.5, 0.5)
    assert [n.kind for n in small.nodes] == ["embedding", "error", "logit"]
    assert [(e.source, e.target) for e in small.edges] == [(1, 2)]
    for bad in (0, 1.2):
        with pytest.raises(ConfigError, match="nodes is"):
            graph.prune(bad)


def test_a_long_prompts_graph_needs_no_matrix_of_its_nodes() -> None:
    # 60,000 errors on one logit: a matrix of them would be 29 GB.
    count = 60_000
    nodes = (Node("logit", 2, 0, 8, probability=1.0), *(Node("error", 0, i, -1) for i in range(count)))
    edges = tuple(Edge(i + 1, 0, 1.0 if i < 10 else 1e-6) for i in range(count))
    graph = AttributionGraph("a", ("a",) * count, "m", 2, nodes, edges)
    assert graph.scores() == pytest.approx({"replacement": 0.0, "completeness": 0.5})
    small = graph.prune(0.9, 1.0)
    assert len(small.nodes) == 11
    assert {edge.target for edge in small.edges} == {0}


def test_a_graph_survives_its_file(tmp_path: Path, whole: AttributionGraph) -> None:
    graph = replace(whole.prune(), notes={"made": "here"}).labelled({("l1", whole.nodes[0].latent): "greetings"})
    graph.save(tmp_path / "g.json")
    assert AttributionGraph.open(tmp_path / "g.json") == graph


def test_the_file_has_the_fields_that_other_tools_read(tmp_path: Path) -> None:
    chain().save(tmp_path / "g.json")
    tree = json.loads((tmp_path / "g.json").read_text())
    assert set(tree) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold"} <= set(tree["metadata"])
    embedding, error, latent, logit = tree["nodes"]
    assert (embedding["node_id"], embedding["layer"], embedding["feature_type"]) == ("E_4_0", "E", "embedding")
    assert (error["node_id"], error["feature_type"]) == ("0_-1_0", "mlp reconstruction error")
    # Cantor's number of (1, 3).
    assert (latent["node_id"], latent["feature"], latent["jsNodeId"]) == ("1_3_0", 13, "1_3-0")
    assert (logit["node_id"], logit["layer"], logit["clerp"]) == ("3_8_0", "3", 'Output "b" (p=0.500)')
    assert logit["is_target_logit"]
    assert tree["links"][0] == {"source": "E_4_0", "target": "1_3_0", "weight": 3.0}


def test_two_coders_of_one_layer_stay_apart_in_a_file(tmp_path: Path) -> None:
    nodes = (
        Node("latent", 1, 0, 3, "a", "x", 2.0),
        Node("latent", 1, 0, 3, "b_c", "x", 3.0),
        Node("logit", 2, 0, 8, token="y", probability=0.5),
    )
    graph = AttributionGraph("x", ("x",), "m", 2, nodes, (Edge(0, 2, 3.0), Edge(1, 2, -1.0)))
    graph.save(tmp_path / "g.json")
    assert AttributionGraph.open(tmp_path / "g.json") == graph
    with pytest.raises(FormatError, match="two nodes '1_3_0_b_c'"):
        replace(graph, nodes=(*nodes, nodes[1])).save(tmp_path / "h.json")


def test_a_file_of_another_tool_is_read(tmp_path: Path) -> None:
    node = {"ctx_idx": 0, "reverse_ctx_idx": 0, "run_idx": 0, "jsNodeId": "x", "clerp": ""}
    tree = {
        "metadata": {"slug": "s", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["a"], "prompt": "a"},
        "qParams": {},
        "nodes": [
            {**node, "node_id": "E_4_0", "feature": 0, "layer": "E", "feature_type": "embedding", "influence": 1.0},
            {**node, "node_id": "1_3_0", "feature": 13, "layer": "1", "feature_type": "cross layer transcoder",
             "influence": 0.6, "activation": 2.0, "clerp": "greetings"},
            {**node, "node_id": "27_8_0", "feature": 8, "layer": "27", "feature_type": "logit", "token_prob": 0.5,
             "is_target_logit": True, "clerp": 'Output " b" (p=0.500)'},
        ],
        "links": [{"source": "1_3_0", "target": "27_8_0", "weight": 1.5}],
    }  # fmt: skip
    (tmp_path / "g.json").write_text(json.dumps(tree))
    graph = AttributionGraph.open(tmp_path / "g.json")
    assert (graph.model, graph.n_layers, [n.kind for n in graph.nodes]) == (
        "gemma-2-2b",
        26,
        ["embedding", "latent", "logit"],
    )
    assert graph.nodes[1].label == "greetings"
    assert [round(n.influence, 6) for n in graph.nodes] == [0.4, 0.6, 0.0]
    assert graph.nodes[2].token == " b"
    assert graph.edges == (Edge(1, 2, 1.5),)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CorruptError, "not JSON"),
        ("[]", FormatError, "expected an object with metadata, nodes and links"),
        ('{"metadata": {}, "nodes": [], "links": []}', FormatError, "'prompt_tokens' is missing"),
        (
            '{"metadata": {"prompt_tokens": [], "prompt": "", "scan": ""}, "nodes": [], '
            '"links": [{"source": "a", "target": "b", "weight": 1}]}',
            FormatError,
            "a link's source 'a' is no node",
        ),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(error, match=message):
        AttributionGraph.open(tmp_path / "g.json")


def test_edges_measured_in_a_linear_model_are_their_weights() -> None:
    lm = linear_model()
    graph = attribution_graph(lm, CODERS, TOKENS, max_latents=30).prune(0.9, 0.9)
    replacement = LocalReplacement(lm, CODERS, TOKENS)
    found = measured(graph, replacement)
    assert len(found.edges) > 20
    for edge in found.edges:
        assert edge.measured == pytest.approx(edge.weight, rel=1e-3, abs=1e-5)


def test_a_linear_skip_is_part_of_what_is_measured() -> None:
    lm, coders = linear_model(), [transcoder(layer, skip=True) for layer in range(3)]
    graph = attribution_graph(lm, coders, TOKENS, max_latents=30).prune(0.9, 0.9)
    for edge in measured(graph, LocalReplacement(lm, coders, TOKENS)).edges:
        assert edge.measured == pytest.approx(edge.weight, rel=1e-3, abs=1e-5)


def test_measuring_takes_no_more_copies_than_the_memory_holds() -> None:
    lm = tiny("llama")
    graph = attribution_graph(lm, CODERS, TOKENS, max_latents=8).prune(0.9, 0.9)
    found = [measured(graph, LocalReplacement(lm, CODERS, TOKENS, memory)) for memory in (1 << 30, 1)]
    assert [_copies(LocalReplacement(lm, CODERS, TOKENS, memory), 4) for memory in (1 << 30, 1)] == [16, 1]
    for one, other in zip(found[0].edges, found[1].edges, strict=True):
        assert one.measured == pytest.approx(other.measured, rel=1e-3, abs=1e-5)


def test_a_heads_bias_is_in_the_logits_value() -> None:
    lm = tiny("phi")
    logits = lm.logits(TOKENS.unsqueeze(0))[0, -1]
    assert lm.unembedding_bias is not None
    assert float(lm.unembedding_bias.std()) > 0
    replacement = LocalReplacement(lm, CODERS, TOKENS)
    assert replacement.logit_target(5).value == pytest.approx(float(logits[5] - logits.mean()), rel=1e-4)
    against = replacement.logit_target(5, torch.tensor([7]))
    assert against.value == pytest.approx(float(logits[5] - logits[7]), rel=1e-4)


def test_measuring_lets_attention_and_norms_answer() -> None:
    lm = tiny("llama")
    graph = attribution_graph(lm, CODERS, TOKENS, max_latents=30).prune(0.9, 0.9)
    found = measured(graph, LocalReplacement(lm, CODERS, TOKENS))
    weights = np.array([e.weight for e in found.edges])
    there = np.array([e.measured for e in found.edges], dtype=float)
    assert np.corrcoef(weights, there)[0, 1] > 0.5
    assert not np.allclose(weights, there, rtol=1e-3)
    with pytest.raises(ConfigError, match="the graph has 9 tokens, the replacement model 4"):
        measured(graph, LocalReplacement(lm, CODERS, TOKENS[:4]))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_score_is_the_sum_over_pairs_of_nodes(family: str) -> None:
    lm = without_biases(family)
    replacement = LocalReplacement(lm, CODERS, TOKENS)
    why = attention_causes(replacement, layer=2, head=1, query=7, key=3, top=10_000)
    assert sum(v for _, v in why.queries) == pytest.approx(why.score, rel=1e-3, abs=1e-5)
    assert sum(v for _, v in why.keys) == pytest.approx(why.score, rel=1e-3, abs=1e-5)
    assert {n.position for n, _ in why.queries} <= set(range(8))
    assert {n.position for n, _ in why.keys} <= set(range(4))
    best = why.pairs[0]
    assert abs(best[2]) == max(abs(p[2]) for p in why.pairs)


def test_heads_add_up_to_what_attention_brought() -> None:
    lm = without_biases("llama")
    replacement = LocalReplacement(lm, CODERS, TOKENS)
    target = replacement.logit_target(5)
    last = [a for a in heads(replacement, target, 10_000) if a.layer == 2]
    # What the last layer's heads write reaches the logit through the stream and the held norm alone.
    z = lm.capture(TOKENS, "blocks.2.attn_out_post")["blocks.2.attn_out_post"][0, -1]
    flow = replacement.forward(1, also=["blocks.2.attn_out_post"])
    whole = torch.zeros_like(flow.reads["final_norm"])
    whole[0, -1] = target.parts[0][1]
    (grad,) = torch.autograd.grad(flow.reads["final_norm"], flow.reads["blocks.2.attn_out_post"], whole)
    assert sum(a.weight for a in last) == pytest.approx(float(grad[0, -1] @ z), rel=1e-3)
    by_head = {h: sum(a.pattern for a in last if a.head == h) for h in range(4)}
    assert by_head == pytest.approx(dict.fromkeys(range(4), 1.0), rel=1e-4)


def test_patterns_are_the_models_own() -> None:
    lm = without_biases("mistral")
    replacement = LocalReplacement(lm, CODERS, TOKENS)
    calls: list[torch.Tensor] = []
    replacement.forward(1, lambda layer, call: calls.append(patterns(call, 8)))
    # A window of 4 tokens.
    assert bool((calls[0][:, :5] == 0).all())
    torch.testing.assert_close(calls[0].sum(-1), torch.ones(4))


@pytest.mark.parametrize(
    ("where", "message"),
    [((9, 0, 5, 1), "has layers 0 to 2"), ((1, 0, 3, 5), "0 <= key <= query < 9"), ((1, 4, 5, 1), "has heads 0 to 3")],
)
def test_a_head_that_is_not_there_is_refused(where: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention_causes(LocalReplacement(tiny("llama"), CODERS, TOKENS), *where)


def test_arguments_are_checked_before_any_pass() -> None:
    lm = tiny("llama")
    with pytest.raises(ModelError, match="token id 200: tiny-llama has ids 0 to 99"):
        attribution_graph(lm, CODERS, TOKENS, targets=[200])
    with pytest.raises(ConfigError, match="max_latents must be at least 0"):
        attribution_graph(lm, CODERS, TOKENS, max_latents=-1)


def test_the_picture_shows_nodes_edges_and_hostile_text(tmp_path: Path) -> None:
    graph = replace(chain(), tokens=("<script>",))
    # A form feed is a token of many vocabularies and no character of XML.
    graph = replace(graph, nodes=(replace(graph.nodes[0], token="<b>"), *graph.nodes[1:]), prompt="a\x0cb\x01")
    graph.picture(tmp_path / "g.svg")
    text = (tmp_path / "g.svg").read_text()
    assert text.count("<path") == 4
    assert text.count("<rect") == 5
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    ElementTree.fromstring(text)


def test_an_edge_in_one_column_goes_past_the_boxes_between(tmp_path: Path) -> None:
    nodes = (
        Node("embedding", -1, 0, 4, token="a"),
        Node("latent", 0, 0, 3, "l0"),
        Node("logit", 1, 0, 8, token="b", probability=0.5),
    )
    AttributionGraph("a", ("a",), "m", 1, nodes, (Edge(0, 1, 1.0), Edge(0, 2, 1.0))).picture(tmp_path / "g.svg")
    root = ElementTree.fromstring((tmp_path / "g.svg").read_text())
    paths = [path.attrib["d"] for path in root.iter("{http://www.w3.org/2000/svg}path")]
    columns = [sorted({float(point.split(",")[0]) for point in re.findall(r"[\d.]+,[\d.]+", d)}) for d in paths]
    assert sorted(len(xs) for xs in columns) == [1, 2]


def test_a_target_is_taken_against_the_graphs_token() -> None:
    lm = tiny("llama")
    replacement = LocalReplacement(lm, CODERS, TOKENS)
    logits = lm.logits(TOKENS.unsqueeze(0))[0, -1]
    node = Node("logit", 3, 8, 7, token="x", probability=0.5)
    assert target_of(replacement, node, 9).value == pytest.approx(float(logits[7] - logits[9]), rel=1e-3)
