"""Which format a place is in, several coders in one place, conversion, and what the messages say."""

from __future__ import annotations

import pytest
import torch

from unmix.coder.coder_set import CoderSet
from unmix.coder.config import CoderConfig, TopK
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import ConfigError, CorruptError, FormatError
from unmix.formats import convert, detect, inspect, load, load_all
from unmix.formats.loading import resolve


def coder(hook: str = "blocks.1.resid_post", seed: int = 0) -> SparseCoder:
    config = CoderConfig(reads=(hook,), d_in=4, n_latents=12, activation=TopK(k=2, relu="before"))
    return SparseCoder(config, seed=seed).eval()


def same(a: SparseCoder, b: SparseCoder) -> bool:
    state = b.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())


def test_round_trip_through_both_formats(tmp_path):
    original = coder()
    original.save(tmp_path / "native")
    assert detect(tmp_path / "native") == "native"
    assert convert(tmp_path / "native", tmp_path / "lens", "sae_lens") == [original.name]
    assert same(original, load(tmp_path / "lens"))
    assert detect(tmp_path / "lens") == "sae_lens"
    convert(tmp_path / "lens", tmp_path / "back", "native")
    back = load(tmp_path / "back")
    assert same(original, back)
    changed = {"training"}
    assert back.config.model_dump(exclude=changed) == original.config.model_dump(exclude=changed)
    assert back.config.training["sae_lens"]["metadata"]["hook_name"] == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("file", ["config.json", "coder.safetensors"])
def test_a_file_names_its_coder(tmp_path, file):
    coder().save(tmp_path / "a")
    assert same(load(tmp_path / "a" / file), coder())
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match="no known format"):
        load(tmp_path / "a" / "notes.txt")


def test_no_format(tmp_path):
    (tmp_path / "weights.dat").write_bytes(b"x")
    with pytest.raises(FormatError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: no known format. Found: weights.dat. Known formats: native, ")
    assert str(caught.value).endswith("; docs/formats.md says which files each is made of")
    assert inspect(tmp_path)["refused"] == str(caught.value)
    with pytest.raises(FormatError, match="no known format"):
        load_all(tmp_path)
    with pytest.raises(FormatError, match="no such file or folder"):
        load(tmp_path / "absent")
    with pytest.raises(
        FormatError, match=r"unknown scheme 'gs'\. Allowed: hf, wandb, .* A place is a folder, a file, hf:"
    ):
        load("gs://bucket/x")


def test_two_formats_in_one_folder(tmp_path):
    coder().save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "sae_lens")
    for file in (tmp_path / "b").iterdir():
        file.rename(tmp_path / "a" / file.name)
    with pytest.raises(FormatError) as caught:
        load(tmp_path / "a")
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: may be native, sae_lens; choose with format='native' (or another of these)"
    )
    assert same(load(tmp_path / "a", format="sae_lens"), coder())
    assert same(load(tmp_path / "a" / "cfg.json"), coder())


def test_several_coders(tmp_path):
    for seed, name in enumerate(("one", "two")):
        coder(seed=seed).save(tmp_path / "coders" / name)
    with pytest.raises(FormatError, match=r"holds 2 coders: coders/one, coders/two; name one"):
        load(tmp_path)
    found = load_all(tmp_path / "coders")
    assert sorted(found) == ["one", "two"]
    assert same(found["two"], coder(seed=1))
    assert list(load_all(tmp_path / "coders" / "one")) == ["blocks.1.resid_post"]


def test_a_named_format_must_fit(tmp_path):
    coder().save(tmp_path / "a")
    with pytest.raises(FormatError, match=r"not sae_lens: looked for cfg\.json"):
        load(tmp_path / "a", format="sae_lens")
    with pytest.raises(ConfigError, match=r"unknown format 'sae_lense'. Did you mean 'sae_lens'"):
        load(tmp_path / "a", format="sae_lense")


def test_convert_never_overwrites(tmp_path):
    coder().save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(FormatError, match="there is something here already"):
        convert(tmp_path / "a", tmp_path / "b", "sae_lens")
    assert (tmp_path / "b" / "thesis.tex").exists()


def test_broken_native_folder_keeps_its_own_message(tmp_path):
    coder().save(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(CorruptError, match="corrupt coder folder"):
        load(tmp_path / "a")
    assert inspect(tmp_path / "a")["settings"]["config.json"].startswith("config.json is not JSON")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    coder().save(tmp_path / "a")
    assert resolve("~/a").folder == tmp_path / "a"


def test_convert_takes_a_coder_in_memory(tmp_path):
    assert convert(coder(), tmp_path / "a", "native") == ["blocks.1.resid_post"]
    assert load(tmp_path / "a").hash() == coder().hash()


def test_convert_many_coders_goes_to_folders_of_their_names(tmp_path):
    for seed, name in enumerate(("one", "two")):
        coder(seed=seed).save(tmp_path / "coders" / name)
    assert convert(tmp_path / "coders", tmp_path / "lens", "sae_lens") == ["one", "two"]
    assert same(load(tmp_path / "lens" / "two"), coder(seed=1))


def test_a_coder_set_is_one_place(tmp_path):
    pair = CoderSet({name: coder(f"blocks.{i}.mlp_out", seed=i) for i, name in enumerate(("a", "b"))})
    pair.save(tmp_path / "set")
    assert detect(tmp_path / "set") == "native_set"
    back = load_all(tmp_path / "set")
    assert isinstance(back, CoderSet)
    assert same(back["b"], pair["b"])
    assert same(load(tmp_path / "set", name="a"), pair["a"])
    with pytest.raises(FormatError, match=r"holds 2 coders whose writes add up; load_all gives them as one CoderSet"):
        load(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"no coder 'c' here\. Allowed: a, b"):
        load(tmp_path / "set", name="c")
    assert convert(tmp_path / "set", tmp_path / "again", "native_set") == ["a", "b"]
    assert same(load_all(tmp_path / "again")["b"], pair["b"])
    assert list(inspect(tmp_path / "set")["coders"]) == ["a", "b"]


def test_a_file_that_cannot_be_opened_is_the_reason_given(tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "sae.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises((FormatError, CorruptError), match="git-lfs pointer"):
        load(tmp_path)
