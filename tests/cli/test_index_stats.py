"""`unmix index stats`: tables, JSON, rankings, token sets and plots of a small index."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from index.oracle import ArrayCodes, make_stream
from unmix.index.reader import open_index
from unmix.index.writer import IndexWriter

Run = Callable[..., tuple[int, str, str]]
WORDS = [" the", " Paris", "\n", "\x1b[31mred", " of", "<b>", "\u202eabc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stream = make_stream(3, n_contexts=40, names=("layers.1", "layers.2"), vocab=7)
    where = tmp_path_factory.mktemp("stats") / "index"
    slices = {"speaker": ("user", "assistant", "tool")}
    with IndexWriter(
        where, {"layers.1": 5, "layers.2": 5}, stream.context, {"model": "tiny"}, vocab=WORDS, slices=slices
    ) as writer:
        codes = {name: ArrayCodes.from_dense(dense.reshape(-1, 5)) for name, dense in stream.codes.items()}
        numbers = {"speaker": np.random.default_rng(0).integers(0, 2, stream.tokens.shape)}
        writer.add(stream.tokens, stream.roles, stream.documents, stream.mask, codes, numbers)
    return where


def test_the_table(folder: Path, run: Run) -> None:
    code, out, _ = run("index", "stats", str(folder))
    stats = open_index(folder).stats
    assert code == 0
    assert f"{stats['n_tokens']:,} tokens, {stats['n_counted']:,} of them counted" in out and "model: tiny" in out
    assert re.search(rf"role +explain +{stats['roles']['explain']['counted']:,} ", out)
    assert re.search(rf"speaker +user +{stats['slices']['speaker']['user']['counted']:,} ", out)
    assert "tool" not in out  # no position is a tool's
    for name, one in stats["coders"].items():
        row = next(line.split() for line in out.splitlines() if line.startswith(name))
        assert row[1:6] == [str(one[key]) for key in ("n_latents", "alive", "dead")] + [
            str(one["dense"][limit]) for limit in ("0.01", "0.1")
        ]


def test_json_has_the_summary_and_what_was_asked(folder: Path, run: Run) -> None:
    code, out, _ = run(
        "index", "stats", str(folder), "--json", "--coder", "layers.1", "--rank", "max,place", "--n", "2",
        "--list", "dead",
        "--tokens", " Paris,#4", "--everywhere", "--min-firings", "1", "--min-documents", "1",
    )  # fmt: skip
    found, stats = json.loads(out), open_index(folder).stats
    assert code == 0
    assert {key: found[key] for key in stats if key != "coders"} == {
        key: stats[key] for key in stats if key != "coders"
    }
    assert found["coders"] == {"layers.1": stats["coders"]["layers.1"]}
    assert len(found["rankings"]["layers.1"]["max"]["latents"]) == 2
    assert found["rankings"]["layers.1"]["max"]["latents"][0]["value"] == stats["coders"]["layers.1"]["max"]
    assert found["lists"] == {"layers.1": {"dead": [4]}}
    hits = found["tokens"]["layers.1"][" Paris,#4"]
    assert hits[0]["share"] == max(hit["share"] for hit in hits) and hits[0]["count"] <= hits[0]["firings"]
    histogram = found["frequency_histogram"]
    assert sum(histogram["latents"]["layers.1"]) == stats["coders"]["layers.1"]["alive"]
    assert len(histogram["log10_edges"]) == len(histogram["latents"]["layers.1"]) + 1


def test_rankings_as_tables_never_carry_a_token_s_control_characters(folder: Path, run: Run) -> None:
    code, out, _ = run("index", "stats", str(folder), "--rank", "frequency", "--n", "3", "--min-firings", "1")
    assert code == 0 and "layers.1: by frequency, 3 of 4 latents that are not noise" in out
    assert '" Paris"' in out and "\x1b" not in out and "\u202e" not in out
    figures = open_index(folder)["layers.1"].figures
    first = out.split("top tokens\n")[1].split()
    assert int(first[0]) == figures.ranking("frequency")[0]
    code, out, _ = run("index", "stats", str(folder), "--tokens", " Paris", "--coder", "layers.2", "--n", "1")
    assert code == 0 and "layers.2: latents by their firings on  Paris" in out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--rank", "maxx"], "no ranking by 'maxx'. Did you mean 'max'"),
        (["--coder", "layers.3"], "no coder 'layers.3'"),
        (["--tokens", " Rome"], "' Rome' is not one token of this index"),
        (["--list", "deed"], "no list of latents 'deed'. Did you mean 'dead'"),
        (["--n", "-1", "--rank", "max"], "n is -1, expected 0 or more"),
        (["--by", "sher", "--tokens", " of"], "cannot order latents by 'sher'. Did you mean 'share'?"),
        (["--plot", "x"], "unknown option --plot."),
    ],
)
def test_what_cannot_be_asked(folder: Path, run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run("index", "stats", str(folder), *arguments)
    assert code == 2 and message in err


def test_plots_are_whole_svgs_that_name_every_coder(folder: Path, run: Run, tmp_path: Path) -> None:
    code, out, _ = run("index", "stats", str(folder), "--plots", str(tmp_path / "plots"))
    assert code == 0
    for name in ("frequency", "activation", "places"):
        path = tmp_path / "plots" / f"{name}.svg"
        assert f"plot  {path}" in out
        tree = ET.parse(path).getroot()
        texts = [text.text or "" for text in tree.iter("{http://www.w3.org/2000/svg}text")]
        assert {"layers.1", "layers.2"} <= set(texts)
        assert not any("nan" in value for node in tree.iter() for value in node.attrib.values())
    frequency = (tmp_path / "plots/frequency.svg").read_text()
    assert "1 dead of 5" in frequency and "share of positions on which a latent fires" in frequency
    (tmp_path / "file").write_text("x")
    code, _, err = run("index", "stats", str(folder), "--plots", str(tmp_path / "file"))
    assert code == 2 and "is a file, expected a folder" in err


def test_help(run: Run) -> None:
    code, out, _ = run("index", "stats", "--help")
    assert code == 0 and "--max-frequency" in out
