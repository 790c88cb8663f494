from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.families import raw_model
from lm.graphs.parts import transcoder
from unmix.lm.graphs import AttributionGraph

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> tuple[str, str]:
    """A model's folder and a folder of three transcoders."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("graph")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    raw_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for layer in range(3):
        transcoder(layer).save(folder / "coders" / f"l{layer}")
    return str(folder / "model"), str(folder / "coders")


def test_a_graph_from_the_command_line(run: Run, places: tuple[str, str], tmp_path: Path) -> None:
    out, picture = tmp_path / "g.json", tmp_path / "g.svg"
    code, said, err = run(
        "graph", *places, "the class of an object", "--latents", "40", "--measure", "--attention", "--out", str(out),
        "--picture", str(picture),
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "prompt   " in said
    assert "measured" in said
    assert "asked by" in said
    assert "of the influence enters latents that were not worked out (--latents)" in said
    graph = AttributionGraph.open(out)
    assert {node.kind for node in graph.nodes} == {"embedding", "latent", "error", "logit"}
    assert all(edge.measured is not None for edge in graph.edges)
    assert picture.read_text().startswith("<svg")


def test_a_target_against_another(run: Run, places: tuple[str, str], tmp_path: Path) -> None:
    code, said, _ = run(
        "graph", *places, "the class", "--target", "7", "--against", "9", "--out", str(tmp_path / "g.json")
    )
    assert code == 0
    logits = [n for n in json.loads((tmp_path / "g.json").read_text())["nodes"] if n["feature_type"] == "logit"]
    assert [n["node_id"].split("_")[1] for n in logits] == ["7"]
    assert said.count("next     ") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "c"], 'graph needs MODEL, CODERS and a "PROMPT"'),
        (["m", "c", "p", "--node", "1"], "unknown option --node"),
        (["m", "c", "p", "--nodes", "2"], "--nodes is 2; allowed: above 0, up to 1"),
        (["m", "c", "p", "--nodes", "x"], "--nodes is 'x', expected a number"),
        (["m", "c", "p", "--out", "g.txt"], "expected a file that ends in .json"),
        (["m", "c", "p", "--out", "a.json", "--out", "b.json"], "--out is given twice"),
        (["m", "c", "p", "--target"], "--target needs a value"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(run: Run, words: list[str], message: str) -> None:
    code, said, err = run("graph", *words)
    assert (code, said) == (2, "")
    assert message in err
    assert "Traceback" not in err
