"""Sources that other processes, and repairs, open again; tokens made once; a run's store."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unmix.coder.coder_set import CoderSet
from unmix.core.config import build
from unmix.core.errors import ConfigError, DataError, ResumeError
from unmix.data.config import DataConfig
from unmix.data.shards import TokenShards
from unmix.index.sources.live import LiveSource
from unmix.index.sources.opening import (
    CoderAt,
    Known,
    ModelAt,
    Opening,
    kept_recipe,
    open_coders,
    open_source,
    recipe_of,
    reopen_coders,
)
from unmix.index.sources.reopen import reopen
from unmix.index.sources.stored import StoreSource
from unmix.index.sources.tokens import is_tokens, open_tokens, prepare_tokens, require_place, tokens_folder
from unmix.lm import LanguageModel
from unmix.train.store import LiveStore, permuted, write_cache

from .tiny import POLICY, coder, joined, same


def recipe(model: Path, shards: TokenShards, places: dict[str, CoderAt]) -> dict[str, Any]:
    return recipe_of("live", ModelAt(str(model), "float32"), places, shards.folder, 8)


def test_a_recipe_travels_and_opens_the_same_source(
    tiny_model_folder: Path, lm: LanguageModel, shards: TokenShards, tmp_path: Path
) -> None:
    coder("topk").save(tmp_path / "coders" / "topk")
    named = open_coders([f"mine={tmp_path / 'coders' / 'topk'}"])
    assert list(named.coders) == ["mine"]
    source = LiveSource(lm, shards, named.coders, batch=8)
    opening = Opening(recipe(tiny_model_folder, shards, named.places), source)
    assert opening() is source
    other = pickle.loads(pickle.dumps(opening))()
    assert other is not source and other.inputs == source.inputs
    assert same(joined(source.batches(3, 21)), joined(other.batches(3, 21)))


def test_known_facts_stand_in_for_a_source(
    tiny_model_folder: Path, lm: LanguageModel, shards: TokenShards, tmp_path: Path
) -> None:
    coder("topk").save(tmp_path / "topk")
    named = open_coders([str(tmp_path / "topk")])
    source = LiveSource(lm, shards, named.coders, batch=8)
    known = Known.of(source, recipe(tiny_model_folder, shards, named.places))
    assert (known.latents, known.inputs, known.slices) == (source.latents, source.inputs, source.slices)
    assert same(joined(known.batches(8, 16)), joined(source.batches(8, 16)))


def test_what_lies_around_an_index_is_found_where_both_were_moved(
    tiny_model_folder: Path, shards: TokenShards, tmp_path: Path
) -> None:
    home = tmp_path / "run"
    coder("topk").save(home / "coders" / "topk")
    (home / "tokens").mkdir()
    made = recipe(tiny_model_folder, shards, {"a": CoderAt(str(home / "coders" / "topk"), "topk")})
    kept = kept_recipe({**made, "tokens": str(home / "tokens")}, home / "index")
    assert kept["tokens"] == "../tokens" and kept["coders"]["a"]["place"] == "../coders/topk"
    home.rename(tmp_path / "moved")
    opening = reopen(kept, tmp_path / "moved" / "index")
    assert opening.recipe["tokens"] == str(tmp_path / "moved" / "tokens")
    assert opening.recipe["coders"]["a"]["place"] == str(tmp_path / "moved" / "coders" / "topk")
    (tmp_path / "moved" / "tokens").rmdir()
    with pytest.raises(ConfigError, match="the tokens of this index are gone"):
        reopen(kept, tmp_path / "moved" / "index")


def test_what_cannot_be_opened_again_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say what it was built from"):
        reopen({}, tmp_path)
    with pytest.raises(ConfigError, match="was built from is 'moon', which this version cannot open"):
        open_source({"kind": "moon"})


def test_coders_of_a_place_have_their_names_or_the_ones_given(tmp_path: Path) -> None:
    CoderSet({"one": coder("topk"), "two": coder("relu")}).save(tmp_path / "set")
    coder("topk").save(tmp_path / "alone")
    assert list(open_coders([str(tmp_path / "set")]).coders) == ["one", "two"]
    named = open_coders([f"s={tmp_path / 'set'}", f"alone={tmp_path / 'alone'}"])
    assert list(named.coders) == ["s/one", "s/two", "alone"]
    again = reopen_coders(named.places)
    assert {name: c.hash() for name, c in again.items()} == {name: c.hash() for name, c in named.coders.items()}
    with pytest.raises(ConfigError, match="two coders are called 'topk'; say --coder NAME="):
        open_coders([str(tmp_path / "alone"), str(tmp_path / "alone")])
    with pytest.raises(ConfigError, match=r"coder 'three' is gone. Did you mean 'one' or 'two'|coder 'three' is gone"):
        reopen_coders({"x": CoderAt(str(tmp_path / "set"), "three")})


def test_a_hook_is_said_where_the_files_do_not(tmp_path: Path) -> None:
    coder("topk", reads=("input",)).save(tmp_path / "c")
    with pytest.raises(ConfigError, match="its files do not say which hook it reads; give it with hook=, or --hook"):
        open_coders([str(tmp_path / "c")])
    named = open_coders([str(tmp_path / "c")], hook="blocks.1.resid_post")
    assert named.coders["topk"].config.reads == ("blocks.1.resid_post",)
    again = reopen_coders({name: CoderAt(**asdict(at)) for name, at in named.places.items()})
    assert again["topk"].hash() == named.coders["topk"].hash()


def test_a_run_s_store_gives_the_same_from_the_cache_and_from_the_model(
    tiny_model_folder: Path, lm: LanguageModel, shards: TokenShards, tmp_path: Path
) -> None:
    made = coder("crosscoder")
    made.save(tmp_path / "crosscoder")
    hooks = made.config.reads
    live = LiveStore(lm, shards, permuted(np.arange(shards.n_contexts), 3), hooks, 8)
    cached = write_cache(live, tmp_path / "cache")
    vocab = lm.token_strings(range(lm.vocab_size))
    one, other = (StoreSource(store, shards, {"c": made}, vocab, {}) for store in (cached, live))
    assert one.inputs == other.inputs
    whole = joined(one.batches(0, 100))
    assert same(whole, joined([*one.batches(0, 37), *one.batches(37, 100)]))
    assert same(whole, joined(other.batches(0, 100)))
    told = recipe_of(
        "store", ModelAt(str(tiny_model_folder), "float32"), {"c": CoderAt(str(tmp_path / "crosscoder"), "crosscoder")},
        shards.folder, 8,
    )  # fmt: skip
    again = open_source({**told, "seed": 3, "hooks": list(hooks)})
    assert again.inputs == one.inputs
    assert same(whole, joined(again.batches(0, 100)))


@pytest.fixture
def config(text: Path) -> DataConfig:
    tree = {"source": str(text), "tokens": 640, "context": 16, "roles": {"explain": 0.5, "score": 0.5}}
    return build(DataConfig, {**tree, "policy": POLICY.model_dump()})


def test_tokens_are_made_once(lm: LanguageModel, config: DataConfig, tmp_path: Path) -> None:
    folder = tokens_folder(tmp_path / "run" / "index")
    assert folder == tmp_path / "run" / "tokens"
    assert tokens_folder(tmp_path / "x") == tmp_path / "x-tokens"
    made = prepare_tokens(config, lm.tokenizer, folder)
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare_tokens(config, lm.tokenizer, folder).hash == made.hash
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    assert is_tokens(str(folder)) and not is_tokens(str(tmp_path))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tokens"]


def test_other_tokens_are_refused_and_what_differs_is_named(
    lm: LanguageModel, config: DataConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "tokens"
    prepare_tokens(config, lm.tokenizer, folder)
    other = config.model_copy(update={"tokens": 320})
    with pytest.raises(ResumeError, match=r"tokens was 640 and is 320\. Say --restart"):
        prepare_tokens(other, lm.tokenizer, folder)
    assert prepare_tokens(other, lm.tokenizer, folder, restart=True).n_tokens == 320


def test_tokens_of_another_policy_are_refused(lm: LanguageModel, config: DataConfig, tmp_path: Path) -> None:
    prepare_tokens(config, lm.tokenizer, tmp_path / "tokens")
    assert open_tokens(tmp_path / "tokens", POLICY, lm.tokenizer).n_tokens == 640
    other = POLICY.model_copy(update={"skip_first": 3})
    with pytest.raises(DataError, match="made with skip_first 1, the coders were trained with 3"):
        open_tokens(tmp_path / "tokens", other, lm.tokenizer)


def test_a_place_that_is_no_index_s_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, expected a folder for the index"):
        require_place(tmp_path / "file")
    (tmp_path / "run" / "coders").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is not empty and holds no index; say --out .*run/index"):
        require_place(tmp_path / "run")
    require_place(tmp_path / "run" / "index")
