"""Releases by name: the catalogue that is shipped, files of the user's own, and what is fetched for a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats.sources.standin import COMMIT
from unmix.core.errors import ConfigError, FormatError
from unmix.formats import load
from unmix.formats.registry import FORMATS
from unmix.formats.sources import fetch
from unmix.formats.sources.catalogue import catalogue, read_catalogue
from unmix.formats.sources.hub import parse as parse_hub
from unmix.formats.sources.releases import resolve_release
from unmix.formats.sources.wandb import parse as parse_wandb


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(f"version: 1\nreleases:\n{text}")
    return path


LOCAL = """
  - name: mine
    also: [mine-too]
    model: me/model
    format: native
    licence: mit
    coders:
      - id: layer_{layer}/{size}
        source: hf://me/coders/layer_{layer}/{size}
        values: {layer: 1-2, size: "*"}
        along: {l0: [30, null]}
        hook: blocks.{layer}.resid_post
      - id: folder_{layer}
        source: hf://me/coders/{folder}
        values: {layer: [1, 2]}
        along: {folder: [layer_1/wide, null]}
"""


def test_every_shipped_release_resolves():
    known = catalogue()
    assert len(known.entries) > 150
    assert {e.format for e in known.entries.values()} <= set(FORMATS.names())
    for entry in known.entries.values():
        ids = entry.ids()
        assert ids and len(ids) == len(set(ids)), entry.name
        for name in [ids[0], ids[-1], *[i for i in ids if i.endswith("/canonical")][:3]]:
            release = resolve_release(f"release:{entry.name}/{name.replace('*', '7')}", known)
            assert "{" not in release.source and "<" not in release.source, release.source
            assert not any(mark in str(value) for value in release.facts.values() for mark in "{<"), release.facts
            parse = {"hf": parse_hub, "wandb": parse_wandb}.get(release.source.partition("://")[0])
            assert parse is not None or release.source.startswith("https://openaipublic.blob.core.windows.net/")
            if parse is not None:
                parse(release.source)


@pytest.mark.parametrize(
    ("name", "source", "facts"),
    [
        (
            "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            "hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            {"model": "google/gemma-2-2b", "hook": "blocks.20.resid_post", "l0": 71, "width": "16k", "layer": 20},
        ),
        (
            "gemma-scope-2b-pt-res-canonical/layer_12/width_65k/canonical",
            "hf://google/gemma-scope-2b-pt-res/layer_12/width_65k/average_l0_72",
            {"l0": 72, "name": "gemma-scope-2b-pt-res", "licence": "cc-by-4.0"},
        ),
        (
            "gpt2-small-res-jb/blocks.8.hook_resid_pre",
            "hf://jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre",
            {"l0": 60, "fvu": 0.1, "hook": "blocks.8.resid_pre~centred", "model": "openai-community/gpt2"},
        ),
        (
            "openai-gpt2-small-v5-32k/resid_post_attn/6",
            "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/"
            "resid_post_attn_v5_32k/autoencoders/6.pt",
            {"hook": "blocks.6.resid_mid", "l0": 32, "width": 32768},
        ),
        (
            "opensae-llama-3.1-8b/layer_07",
            "hf://THU-KEG/OpenSAE-LLaMA-3.1-Layer_07",
            {"hook": "blocks.7.resid_post"},
        ),
        (
            "e2e-gpt2-wandb/e2e_similar_l0_layer_6",
            "wandb://sparsify/gpt2/tvj2owza",
            {"hook": "blocks.6.resid_pre~centred"},
        ),
        (
            "gemma-scope-2-1b-pt-res-all/layer_3_width_16k_l0_big",
            "hf://google/gemma-scope-2-1b-pt/resid_post_all/layer_3_width_16k_l0_big",
            {"model": "google/gemma-3-1b-pt", "l0": 80},
        ),
        (
            "skip-transcoder-Llama-3.2-1B-131k/layers.5.mlp",
            "hf://EleutherAI/skip-transcoder-Llama-3.2-1B-131k/layers.5.mlp",
            {"hook": "blocks.5.mlp_in", "hook_out": "blocks.5.mlp_out"},
        ),
    ],
)
def test_names_that_people_use(name, source, facts):
    release = resolve_release(f"release:{name}")
    assert release.source == source
    assert {key: release.facts.get(key) for key in facts} == facts


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "release:gemma-scope-2b-pt-ress/x",
            r"no release 'gemma-scope-2b-pt-ress'\. Did you mean 'gemma-scope-2b-pt-res'",
        ),
        ("release:zzzzqq/x", r"no release 'zzzzqq'\. `unmix releases` lists all \d+"),
        ("release:gpt2-small-res-jb", r"which of its 13 coders\? `unmix releases --ids gpt2-small-res-jb` lists them"),
        (
            "release:gpt2-small-res-jb/blocks.12.hook_resid_pre",
            r"has no coder 'blocks\.12\.hook_resid_pre'\. Did you mean 'blocks\.\d+\.hook_resid_pre'",
        ),
        ("release:gemma-scope-2b-pt-res/layer_26/width_16k/average_l0_7", "has no coder 'layer_26"),
        ("release:gemma-scope-2b-pt-res/layer_12/width_131k/canonical", "has no coder 'layer_12/width_131k/canonical'"),
        ("release:gemma-scope-2-27b-pt-transcoders-all/layer_4_width_16k_l0_big", "has no coder 'layer_4_width_16k"),
    ],
)
def test_names_that_are_wrong(text, match):
    with pytest.raises(FormatError, match=match):
        resolve_release(text)


def test_what_was_never_published_is_not_listed():
    ids = catalogue().entries["gemma-scope-2-27b-pt-transcoders-all"].ids()
    assert "layer_4_width_16k_l0_big" not in ids and "layer_4_width_16k_l0_big_affine" in ids


def test_a_release_of_one_coder_needs_no_id(tmp_path):
    known = catalogue(
        own(tmp_path, "  - {name: one, model: m, format: native, coders: [{id: x, source: 'hf://a/b'}]}\n")
    )
    assert resolve_release("release:one", known).source == "hf://a/b"


def test_a_release_is_loaded_with_its_facts(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("UNMIX_RELEASES", str(own(tmp_path, LOCAL)))
    found = fetch("release:mine/layer_1/wide")
    assert found.origin == {
        "scheme": "release", "place": "release:mine/layer_1/wide", "source": "hf://me/coders/layer_1/wide",
        "repo": "me/coders", "revision": COMMIT, "path": "layer_1/wide",
        "release": {
            "name": "mine", "id": "layer_1/wide", "model": "me/model", "format": "native", "licence": "mit",
            "hook": "blocks.1.resid_post", "layer": 1, "size": "wide", "l0": 30,
        },
    }  # fmt: skip
    assert load("release:mine-too/folder_1").n_latents == 6
    with pytest.raises(FormatError, match="has no coder 'folder_2'"):
        fetch("release:mine/folder_2")


def test_an_open_part_is_listed_at_the_source(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("UNMIX_RELEASES", str(own(tmp_path, LOCAL)))
    with pytest.raises(FormatError, match=r"2 coders; name one: layer_1/narrow, layer_1/wide"):
        fetch("release:mine/layer_1")
    (hub.root / "layer_1" / "narrow").rmdir()
    found = fetch("release:mine/layer_1")
    assert found.origin["release"]["id"] == "layer_1/wide" and found.origin["release"]["size"] == "wide"
    with pytest.raises(FormatError, match="has no folder 'layer_2'"):
        fetch("release:mine/layer_2")


def test_a_file_of_ones_own_wins_and_rows_are_combined(tmp_path):
    text = """
  - name: gpt2-<site>-<size>k
    each: [[{site: res}, {site: mlp}], [{size: 1, layers: 0-2}, {size: 2, layers: ["00", "01"]}]]
    model: m
    format: native
    coders: [{id: "l{layer}", source: "hf://me/<site>/{layer}", values: {layer: <layers>}, facts: {width: <size>}}]
  - name: gpt2-small-res-jb
    model: mine
    format: native
    coders: [{id: x, source: "hf://me/x"}]
"""
    known = catalogue(own(tmp_path, text))
    assert [e for e in known.entries if e.endswith("k") and e.startswith(("gpt2-res", "gpt2-mlp"))] == [
        "gpt2-res-1k", "gpt2-res-2k", "gpt2-mlp-1k", "gpt2-mlp-2k",
    ]  # fmt: skip
    assert known.entries["gpt2-mlp-1k"].ids() == ["l0", "l1", "l2"]
    assert known.entries["gpt2-res-2k"].ids() == ["l00", "l01"]
    assert resolve_release("release:gpt2-mlp-1k/l2", known).facts["width"] == 1
    assert known.entries["gpt2-small-res-jb"].model == "mine"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("  - 3\n", "a release is a mapping of fields, found 3"),
        ("  - {name: a b, model: m, format: f, coders: [{id: x, source: y}]}\n", "name"),
        ("  - {name: a, model: m, format: f, coder: []}\n", r"unknown field 'coder'\. Did you mean 'coders'"),
        ("  - {name: a, model: m, format: f, coders: []}\n", "coders"),
        (
            "  - {name: a, model: m, format: f, coders: "
            "[{id: 'l{layer}', source: 'hf://a/{layr}', values: {layer: 0-1}}]}\n",
            r"source names \{layr\}, which neither values nor along has",
        ),
        (
            "  - {name: a, model: m, format: f, coders: [{id: x, source: 'hf://a/{layer}', values: {layer: 0-1}}]}\n",
            "the variable 'layer' is not part of the id",
        ),
        (
            "  - {name: a, model: m, format: f, coders: "
            "[{id: 'l{layer}', source: 'hf://a/{layer}', values: {layer: 0-1}, along: {l0: [1]}}]}\n",
            "l0 has 1 entries, expected 2",
        ),
        (
            "  - {name: a, model: m, format: f, coders: [{id: '{n}/x', source: 'hf://a/b/{n}/x', values: {n: '*'}}]}\n",
            "must stand in the last part",
        ),
        (
            "  - {name: a, model: m, format: f, coders: [{id: '{n}', source: 'https://a/b/{n}', values: {n: '*'}}]}\n",
            "needs an hf:// source",
        ),
        (
            "  - {name: a, model: m, format: f, coders: [{id: x, source: y}]}\n"
            "  - {name: b, also: [a], model: m, format: f, coders: [{id: x, source: y}]}\n",
            "'a' is named twice",
        ),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match) as caught:
        read_catalogue(own(tmp_path, text))
    assert "own.yaml" in str(caught.value)


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("releases: []")
    with pytest.raises(ConfigError, match="version must be 1, found None"):
        read_catalogue(path)
    with pytest.raises(ConfigError, match="no such file of releases"):
        catalogue(tmp_path / "absent.yaml")
