"""`hf://` places against a local server that answers as the hub does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from formats.sources.conftest import small_coder
from formats.sources.standin import COMMIT, Hub
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import FormatError, ServiceError
from unmix.formats import load, load_all
from unmix.formats.sources.hub import fetch, parse, subfolders

NATIVE = ["coder.safetensors", "config.json", "manifest.json"]


def put(hub: Hub, *names: str, size: int = 10) -> None:
    for name in names:
        path = hub.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode().ljust(size, b"."))


def test_parts_of_a_place():
    place = parse("hf://google/gemma-scope@v1/layer_20/width_16k")
    assert (place.repo, place.revision, place.path) == ("google/gemma-scope", "v1", "layer_20/width_16k")
    assert parse("hf://a/b").path == "" and parse("hf://a/b/").revision is None
    assert parse("hf://a/b@refs%2Fpr%2F1/c").revision == "refs/pr/1"
    with pytest.raises(FormatError, match="expected hf://owner/repo/path"):
        parse("hf://onlyowner")


def test_a_folder_is_fetched_and_nothing_else(hub):
    found = fetch("hf://me/coders/layer_1/wide")
    assert sorted(hub.fetched) == [f"layer_1/wide/{name}" for name in NATIVE]
    assert found.origin == {
        "scheme": "hf", "place": "hf://me/coders/layer_1/wide", "repo": "me/coders", "revision": COMMIT,
        "path": "layer_1/wide",
    }  # fmt: skip
    assert sorted(p.name for p in found.path.iterdir()) == NATIVE
    fetch("hf://me/coders@v1/layer_1/wide")
    assert len(hub.fetched) == 3, "the same commit is fetched once"


def test_load_reads_from_the_hub(hub):
    loaded = load("hf://me/coders/layer_1/wide")
    assert torch.equal(loaded.W_dec, small_coder().W_dec)
    assert load("hf://me/coders/layer_1/wide/config.json").hash() == small_coder().hash()


def test_load_all_fetches_what_lies_below(hub):
    other = SparseCoder(small_coder().config, seed=6).eval()
    other.save(hub.root / "layer_2" / "wide")
    coders = load_all("hf://me/coders")
    assert {name: coder.hash() for name, coder in coders.items()} == {
        "layer_1/wide": small_coder().hash(),
        "layer_2/wide": other.hash(),
    }
    assert "README.md" not in hub.fetched


def test_a_file_comes_with_what_is_needed_to_read_it(hub):
    mine = "final_blocks.3.hook_resid_pre_24576"
    put(hub, f"mats/{mine}.pt", f"mats/{mine}_log_feature_sparsity.pt", "mats/final_blocks.4.hook_resid_pre_24576.pt")
    put(
        hub,
        "mats/cfg.json",
        "mats/final_blocks.4.hook_resid_pre_24576.json",
        "mats/final_blocks.4.hook_resid_pre_24576_cfg.json",
    )
    found = fetch(f"hf://me/coders/mats/{mine}.pt")
    assert found.path.name == f"{mine}.pt" and found.path.is_file()
    assert sorted(hub.fetched) == [f"mats/{n}" for n in ("cfg.json", f"{mine}.pt", f"{mine}_log_feature_sparsity.pt")]


def test_all_shards_of_one_coder_are_fetched(hub):
    shards = [f"os/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    put(hub, *shards, "os/model.safetensors.index.json", "os/config.json", "os/other.safetensors")
    fetch(f"hf://me/coders/{shards[0]}")
    assert sorted(hub.fetched) == sorted([*shards, "os/model.safetensors.index.json", "os/config.json"])


def test_weights_in_a_folder_of_their_own_belong_to_the_coder_above(hub):
    put(hub, "ls/hyperparams.json", "ls/checkpoints/final.safetensors", "ls/other/final.safetensors")
    found = fetch("hf://me/coders/ls")
    assert sorted(hub.fetched) == ["ls/checkpoints/final.safetensors", "ls/hyperparams.json"]
    assert found.path.name == "ls"
    assert fetch("hf://me/coders/ls/checkpoints/final.safetensors").path.name == "final.safetensors"


def test_a_folder_may_be_named_like_a_file(hub):
    put(hub, "v5_layer_0.pt/sae_weights.safetensors", "v5_layer_0.pt/cfg.json", "v5_layer_1.pt/cfg.json")
    found = fetch("hf://me/coders/v5_layer_0.pt")
    assert found.path.is_dir() and sorted(p.name for p in found.path.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_what_is_not_there(hub):
    def said(place: str) -> str:
        with pytest.raises(FormatError) as caught:
            fetch(place)
        return str(caught.value)

    assert said("hf://me/coders").endswith("holds only folders; name one of them, or use load_all: layer_1")
    assert "no repository me/others on the hub; a private one needs a token" in said("hf://me/others/x")
    assert "no repository me/private on the hub; a private one needs a token" in said("hf://me/private/x")
    assert said("hf://me/coders@v9/layer_1").endswith("me/coders has no branch, tag or commit 'v9'")
    assert said("hf://me/coders/layer_l/wide").endswith("has no folder 'layer_l'. Did you mean 'layer_1'?")
    assert "layer_1 of me/coders has no folder 'wyde'. Did you mean 'wide'?" in said("hf://me/coders/layer_1/wyde")
    assert "layer_1/wide has no file of that name. Did you mean 'config.json' or" in said(
        "hf://me/coders/layer_1/wide/confg.json"
    )
    assert "holds no files that a coder could be in" in said("hf://me/coders/layer_1/narrow")
    hub.gated = True
    assert "asks for its licence to be accepted on the hub, and for a token" in said("hf://me/coders/layer_1/wide")


def test_many_names_are_not_all_listed(hub):
    put(hub, *(f"many/part_{i}/ae.pt" for i in range(40)))
    with pytest.raises(FormatError, match=r"There are part_0, .* and 28 more\.$"):
        fetch("hf://me/coders/many/zzz")


def test_a_renamed_repository_is_followed_and_said(hub, caplog):
    hub.renamed = True
    found = fetch("hf://old/name/layer_1/wide")
    assert found.origin["repo"] == "me/coders" and found.path.is_dir()
    assert "old/name is called me/coders now" in caplog.text


def test_too_much_is_not_fetched_by_accident(hub, monkeypatch):
    put(hub, "big/a.safetensors", "big/b.safetensors")
    for name in ("a", "b"):
        (hub.root / "big" / f"{name}.safetensors.claims").write_text(str(12 * 10**9))
    with pytest.raises(FormatError, match=r"2 files, 24\.0 GB, more than the limit of 20 GB") as caught:
        fetch("hf://me/coders/big")
    assert "hf download me/coders" in str(caught.value) and hub.fetched == []
    monkeypatch.setenv("UNMIX_FETCH_LIMIT_GB", "lots")
    with pytest.raises(FormatError, match="UNMIX_FETCH_LIMIT_GB must be a number, found 'lots'"):
        fetch("hf://me/coders/big")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_does_not_answer(hub, status):
    hub.status = status
    with pytest.raises(ServiceError, match="the hub does not answer") as caught:
        fetch("hf://me/coders/layer_1/wide")
    assert caught.value.exit_code == 3


def test_a_hub_that_cannot_be_reached(hub):
    with pytest.raises(ServiceError, match="the hub does not answer"):
        fetch("hf://me/coders/layer_1/wide", endpoint="http://127.0.0.1:9")


def test_a_refusal_is_not_an_outage(hub):
    hub.status = 403
    with pytest.raises(FormatError, match="the hub refuses"):
        fetch("hf://me/coders/layer_1/wide")


def test_the_cache_serves_when_the_hub_does_not(hub, caplog):
    first = fetch("hf://me/coders/layer_1/wide")
    hub.status = 500
    again = fetch("hf://me/coders/layer_1/wide")
    assert (again.path, again.origin) == (first.path, first.origin)
    assert "using the copy in the cache" in caplog.text


def test_offline_takes_the_cache_and_asks_nobody(hub, monkeypatch):
    import huggingface_hub.constants

    first = fetch("hf://me/coders/layer_1/wide")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.status = 418
    assert fetch("hf://me/coders/layer_1/wide").path == first.path
    with pytest.raises(ServiceError, match=r"not in the cache, and the hub may not be asked \(HF_HUB_OFFLINE is set\)"):
        fetch("hf://me/coders/layer_1/narrow")


def test_offline_finds_what_another_program_fetched(hub, monkeypatch):
    import huggingface_hub.constants
    from huggingface_hub import hf_hub_download

    for name in NATIVE:
        hf_hub_download("me/coders", f"layer_1/wide/{name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = fetch("hf://me/coders/layer_1/wide")
    assert found.origin["revision"] == COMMIT and (found.path / "config.json").is_file()


def test_half_a_folder_in_the_cache_is_not_offered(hub, monkeypatch):
    import huggingface_hub.constants

    found = fetch("hf://me/coders/layer_1/wide")
    (found.path / "coder.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ServiceError, match="not in the cache"):
        fetch("hf://me/coders/layer_1/wide")


def test_a_dropped_connection_is_resumed(hub, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    put(hub, "large/ae.pt", size=300_000)
    hub.cut_after, hub.cuts = 100_000, 2
    found = fetch("hf://me/coders/large/ae.pt")
    assert found.path.read_bytes() == (hub.root / "large" / "ae.pt").read_bytes()
    assert hub.ranges == ["bytes=100000-", "bytes=200000-"]


def test_a_connection_that_keeps_dropping_leaves_nothing_half(hub, tmp_path):
    put(hub, "large/ae.pt", size=300_000)
    hub.cut_after, hub.cuts = 0, 99
    with pytest.raises(ServiceError, match="the hub does not answer"):
        fetch("hf://me/coders/large/ae.pt")
    assert [p.name for p in Path(tmp_path, "hub-cache").rglob("ae.pt")] == []
    hub.cuts = 0
    assert fetch("hf://me/coders/large/ae.pt").path.stat().st_size == 300_000


def test_a_newer_commit_is_seen_and_an_older_one_can_be_named(hub):
    old = fetch("hf://me/coders/layer_1/wide").origin["revision"]
    hub.commit = "f" * 40
    assert fetch("hf://me/coders/layer_1/wide").origin["revision"] == "f" * 40 != old


def test_progress_is_said_for_large_fetches(hub, caplog, monkeypatch):
    monkeypatch.setattr("unmix.formats.sources.hub.SAY_FROM_MB", 0.0)
    caplog.set_level(logging.INFO, "unmix")
    fetch("hf://me/coders/layer_1/wide")
    assert "fetching 3 files, 0 MB, from me/coders" in caplog.text


def test_subfolders(hub):
    assert subfolders("hf://me/coders/layer_1") == ["narrow", "wide"]
