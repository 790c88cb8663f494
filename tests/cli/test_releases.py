"""`unmix releases`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmix.cli import main


@pytest.fixture(autouse=True)
def only_the_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNMIX_RELEASES", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["releases", *arguments]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def test_all_releases_fit_a_hundred_columns(capsys):
    lines = run(capsys).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) > 300
    at = lines.index("gpt2-small-res-jb")
    assert lines[at + 1] == "    openai-community/gpt2  resid_pre~centred, resid_post~centred  width 24576  L0 10–70"
    assert lines[at + 2] == "    sae_lens_legacy, 13 coders, hf://jbloom/GPT2-Small-SAEs-Reformatted"


def test_a_search_takes_every_word(capsys):
    names = [line for line in run(capsys, "GEMMA-2-9b", "pt-att").splitlines() if line and line[0] not in " 0123456789"]
    assert names == ["gemma-scope-9b-pt-att"]


def test_nothing_found_names_what_is_near(capsys):
    assert "no release has 'gema' in it. Did you mean 'gemma'?" in run(capsys, "gema", code=2)


def test_ids_of_one_release(capsys):
    assert run(capsys, "--ids", "gpt2-small-res-jb", "resid_post") == (
        "release:gpt2-small-res-jb/blocks.11.hook_resid_post\n"
    )
    ids = run(capsys, "--ids", "gemma-scope-2b-pt-res", "layer_20").splitlines()
    assert "release:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_*" in ids
    assert "release:gemma-scope-2b-pt-res/layer_20/width_16k/canonical" in ids
    assert "no release 'gpt2-small-res-jp'. Did you mean 'gpt2-small-res-jb'" in run(
        capsys, "--ids", "gpt2-small-res-jp", code=2
    )
    assert "has no ID with 'layer_99' in it" in run(capsys, "--ids", "gpt2-small-res-jb", "layer_99", code=2)


def test_json(capsys):
    (found,) = json.loads(run(capsys, "openai-gpt2-small-v5-128k", "--json"))
    assert found["width"] == ["131072"] and found["l0"] == ["32"] and found["coders"] == 48
    assert found["hooks"] == ["attn_out_post", "resid_mid", "mlp_out_post", "resid_post"]
    assert json.loads(run(capsys, "--ids=openai-gpt2-small-v4", "--json", "mlp_post"))[0].endswith("/mlp_post_act/0")
    assert json.loads(run(capsys, "nothing-like-this", "--json")) == []


def test_a_file_of_ones_own(capsys, tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "version: 1\nreleases: [{name: mine, model: m, format: native, coders: [{id: x, source: 'hf://a/b'}]}]"
    )
    assert run(capsys, "mine", "--file", str(path)).splitlines()[:3] == [
        "mine",
        "    m",
        "    native, 1 coder, hf://a/b",
    ]
    assert "no such file of releases" in run(capsys, "--file", str(tmp_path / "absent.yaml"), code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--id", "x"], "unknown flag '--id'. Did you mean '--ids'"), (["--ids"], "--ids needs a value")],
)
def test_flags_that_are_wrong(capsys, arguments, said):
    assert said in run(capsys, *arguments, code=2)
