"""One saved coder gives back its model, itself, and the text it was trained on, packed as training packed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unmix
from lm.families import raw_model
from unmix.coder import CoderConfig, SparseCoder
from unmix.coder.config import TopK
from unmix.core.errors import ConfigError, DataError, ModelError
from unmix.core.policy import InputPolicy
from unmix.data import DataConfig
from unmix.data.tokenise import tokenise
from unmix.lm import LanguageModel, load_model
from unmix.train import session as room
from unmix.train.session import load_session, stream_contexts

HOOK = "blocks.1.resid_post"


@pytest.fixture(scope="session")
def model_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    raw_model("gpt2", vocab_size=512).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents, one of them twice."""
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate([prose[0], *prose]):
        (folder / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def saved(folder: Path, **changes: Any) -> Path:
    fields: dict[str, Any] = {"reads": (HOOK,), "d_in": 16, "n_latents": 32, "activation": TopK(k=4), **changes}
    SparseCoder(CoderConfig(**fields), seed=1).save(folder)
    return folder


@pytest.mark.parametrize("bos", ["context", "document", "none"])
def test_streamed_contexts_are_those_of_training(texts: Path, tiny_tokenizer: Any, tmp_path: Path, bos: Any) -> None:
    config = DataConfig(source=str(texts), tokens=8000, context=32, seed=3, policy=InputPolicy(bos=bos))
    shards = tokenise(config, tiny_tokenizer, tmp_path / "tokens", progress=False)
    for role in ("train", "score"):
        stored = shards.tokens(shards.contexts_of(role))
        streamed = list(stream_contexts(config, tiny_tokenizer, role))[: len(stored)]
        assert np.array_equal(np.stack(streamed), stored)
    everything = DataConfig(source=str(texts), tokens=8000, context=32, roles={"train": 1.0}, policy=config.policy)
    whole = tokenise(everything, tiny_tokenizer, tmp_path / "whole", progress=False)
    streamed = list(stream_contexts(config, tiny_tokenizer))[: whole.n_contexts]
    assert np.array_equal(np.stack(streamed), whole.tokens(range(whole.n_contexts)))


@pytest.mark.parametrize("kind", ["rows", "documents"])
@pytest.mark.parametrize("bos", ["context", "document", "none"])
def test_streamed_ids_are_those_of_training(tiny_tokenizer: Any, tmp_path: Path, kind: Any, bos: Any) -> None:
    """Rows of 70 ids, which contexts of 32 do not divide, one of them twice."""
    rows = np.random.default_rng(0).integers(0, 512, (200, 70))
    np.save(tmp_path / "ids.npy", np.concatenate([rows, rows[:1]]))
    fields: dict[str, Any] = {"source": str(tmp_path / "ids.npy"), "tokenised": kind, "policy": InputPolicy(bos=bos)}
    config = DataConfig(tokens=6000, context=32, seed=3, **fields)
    shards = tokenise(config, tiny_tokenizer, tmp_path / "tokens", progress=False)
    for role in ("train", "score"):
        stored = shards.tokens(shards.contexts_of(role))
        streamed = list(stream_contexts(config, tiny_tokenizer, role))[: len(stored)]
        assert np.array_equal(np.stack(streamed), stored)
    np.save(tmp_path / "ids.npy", np.full((2, 40), 512))
    with pytest.raises(DataError, match=r"ids\.npy:1: the id 512 is not in the model's vocabulary \(0 to 511\)"):
        next(stream_contexts(config, tiny_tokenizer))


def test_a_coder_of_ids_gets_its_ids(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """Its files say so (e2e_sae), or nobody says what the data set holds (SAELens), or the call says it."""
    import json

    pytest.importorskip("datasets")
    rows = np.random.default_rng(0).integers(0, 512, (4, 32)).tolist()
    names = {"input_ids": "a", "tokens": "b", "words": "c"}
    for column, name in names.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({column: row, "meta": 1}) for row in rows]
        (tmp_path / name / "train.jsonl").write_text("\n".join(lines))
    common = {"model": {"name": str(model_folder)}, "input_policy": InputPolicy(bos="none")}
    e2e = {"train_data": {"dataset_name": str(tmp_path / "a"), "n_ctx": 32, "is_tokenized": True, "split": "train"}}
    found = load_session(saved(tmp_path / "e2e", **common, training={"e2e_sae": e2e}))
    assert found.data is not None
    assert (found.data.source, found.data.tokenised, found.data.column) == (f"hf:{tmp_path / 'a'}", "rows", "input_ids")
    lens = {"dataset": str(tmp_path / "b"), "context_size": 32}
    unsaid = saved(tmp_path / "lens", **common, training=lens)
    for session in (found, load_session(unsaid)):
        assert session.tokens(128).tolist() == rows
    told = load_session(unsaid, source=f"hf:{tmp_path / 'c'}", column="words", tokenised="documents", context=8)
    assert told.data is not None
    assert (told.data.tokenised, told.data.column, told.data.split) == ("documents", "words", "train")
    assert told.tokens(8).tolist() == [rows[0][:8]]
    # Text that is named in their place has no column of ids; a data set with neither is refused by its columns.
    text = load_session(saved(tmp_path / "text", **common, training={"e2e_sae": e2e}), source=str(texts), context=8)
    assert text.data is not None
    assert (text.data.tokenised, text.data.column) == (None, "text")
    neither = saved(tmp_path / "neither", **common, training={**lens, "dataset": str(tmp_path / "c")})
    with pytest.raises(DataError, match=r"row 1: no column 'text'; found words, meta$"):
        load_session(neither).tokens(32)


def test_one_token_for_bos_and_separator_ends_nothing_at_the_start(tiny_tokenizer: Any) -> None:
    """As GPT-2 has it: the first position of a context belongs to the document behind it, as in stored shards."""
    policy = InputPolicy(bos="context", bos_id=9, separator_id=9, attend_across=False)
    documents = room.packed_documents(torch.tensor([[9, 5, 9, 6]]), policy)
    assert documents is not None
    assert documents.tolist() == [[0, 0, 0, 1]]
    none = room.packed_documents(torch.tensor([[9, 5, 9, 6]]), policy.model_copy(update={"bos": "none"}))
    assert none is not None
    assert none.tolist() == [[0, 1, 1, 2]]


def test_text_is_read_no_further_than_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    from unmix.data import Document

    taken: list[int] = []

    def documents(_: DataConfig) -> Any:
        for i in range(10_000):
            taken.append(i)
            yield Document(f"a text of number {i} and more words", str(i))

    monkeypatch.setattr(room, "open_corpus", documents)
    stream = stream_contexts(DataConfig(context=16), tiny_tokenizer)
    next(stream)
    assert len(taken) <= 64


def test_everything_comes_from_the_coder(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(texts), tokens=8000, context=32, seed=5)
    place = saved(
        tmp_path / "c", model={"name": str(model_folder)}, training={"data": data.model_dump(mode="json")}, name="mine"
    )
    found = unmix.load_session(place, dtype="float32")
    assert (found.lm.name, found.lm.dtype) == (str(model_folder), torch.float32)
    assert (found.coder.name, found.coder.config.reads) == ("mine", (HOOK,))
    assert found.data is not None
    assert (found.data.source, found.data.context, found.data.seed) == (str(texts), 32, 5)
    tokens = found.tokens(100)
    assert tokens.shape == (3, 32)
    assert (tokens[:, 0] == found.lm.tokenizer.bos_token_id).all()
    batches = list(found.batches(4))
    assert {len(b) for b in batches[:-1]} == {4}
    assert torch.equal(torch.cat(batches)[:3], tokens)
    assert len(found.tokens(10**9)) == sum(map(len, batches)), "what the text gives, where it is less"
    rows = next(found.activations(4))
    assert rows.shape == (4 * 31, 16), "the first position of a context is masked"
    expected = found.lm.capture(batches[0], [HOOK])[HOOK][:, 1:].flatten(0, 1)
    assert torch.equal(rows, expected)
    assert found.coder(rows).reconstruction.shape == rows.shape


def test_packed_documents_kept_apart_are_captured_apart(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    policy = InputPolicy(bos="none", separator_id=0, attend_across=False, skip_first=0)
    place = saved(tmp_path / "c", input_policy=policy, model={"name": str(model_folder)})
    found = load_session(place, source=str(texts), context=64, dtype="float32")
    batch = next(found.batches(16))
    assert bool((batch[:, :-1] == 0).any()), "some document ends inside a context"
    ends = (batch == 0).long()
    documents = ends.cumsum(-1) - ends
    expected = found.lm.capture(batch, [HOOK], policy, documents=documents)[HOOK].flatten(0, 1)
    assert torch.equal(next(found.activations(16)), expected)
    together = found.lm.capture(batch, [HOOK])[HOOK].flatten(0, 1)
    assert not torch.allclose(expected, together)


def test_a_crosscoder_reads_its_hooks_side_by_side(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    hooks = ("blocks.0.resid_post", HOOK)
    place = saved(tmp_path / "c", reads=hooks, d_in=32)
    found = load_session(place, model=str(model_folder), source=str(texts), dtype="float32")
    rows = next(found.activations(2))
    alone = found.lm.capture(next(found.batches(2)), list(hooks))
    assert torch.equal(rows[:, 16:], alone[HOOK][:, 1:].flatten(0, 1))
    unsaid = saved(tmp_path / "d", reads=("input.0", "input.1"), d_in=32)
    told = load_session(unsaid, model=str(model_folder), source=str(texts), hook=hooks, dtype="float32")
    assert torch.equal(next(told.activations(2)), rows)


def test_published_names_become_the_hubs(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, texts: Path, root: Path
) -> None:
    """mats_sae_training's pickles say `gpt2-small` and a data set; contexts of 64, which the model takes."""
    asked: list[tuple[str, Any]] = []

    def stand_in(name: str, **options: Any) -> LanguageModel:
        asked.append((name, options["dtype"]))
        config = {"n_layer": 4}
        tokenizer = load_model(model_folder).tokenizer
        return LanguageModel(raw_model("gpt2", vocab_size=512, **config), name, tokenizer)

    monkeypatch.setattr("unmix.lm.load.load_model", stand_in)
    place = root / "tests/parity/sae_lens/mats_pt/final_sparse_autoencoder_gpt2-small_blocks.3.hook_resid_pre_48.pt"
    found = load_session(place)
    assert asked == [("gpt2", None)]
    assert found.data is not None
    assert (found.data.source, found.data.context) == ("hf:some/dataset", 64)
    assert found.coder.config.reads == ("blocks.3.resid_pre~centred",)
    found = load_session(place, source=str(texts), context=16)
    assert found.tokens(64).shape == (4, 16)
    with pytest.raises(ConfigError, match="context is 65; gpt2 takes 2 to 64 tokens"):
        load_session(place, context=65)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", "gpt2"),
        ("gpt2-xl", "gpt2-xl"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("builtin:smollm2", "builtin:smollm2"),
        ("unknown-model", "unknown-model"),
    ],
)
def test_transformer_lens_names(name: str, expected: str) -> None:
    assert room.hub_name(name) == expected


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, {}),
        ({"dataset": "a/b", "context_size": 64}, {"source": "hf:a/b", "context": 64}),
        (
            {"e2e_sae": {"train_data": {"dataset_name": "a/b", "n_ctx": 32, "column_name": "t", "split": "train"}}},
            {"source": "hf:a/b", "context": 32, "column": "t", "tokenised": "rows", "split": "train"},
        ),
        (
            {"e2e_sae": {"train_data": {"dataset_name": "a/b", "n_ctx": 32}}},
            {"source": "hf:a/b", "context": 32, "column": "input_ids", "tokenised": "rows"},
        ),
        (
            {"e2e_sae": {"train_data": {"dataset_name": "a/b", "is_tokenized": False, "column_name": "text"}}},
            {"source": "hf:a/b", "column": "text"},
        ),
        ({"dictionary_learning": {"buffer": {"ctx_len": 128}}}, {"context": 128}),
        ({"data": {"source": "x.txt", "context": 16}}, {"source": "x.txt", "context": 16}),
    ],
)
def test_what_training_facts_say_of_the_text(training: dict[str, Any], expected: dict[str, Any]) -> None:
    assert room.trained_data(CoderConfig(d_in=4, n_latents=8, activation=TopK(k=2), training=training)) == expected


def test_clear_errors(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    bare = saved(tmp_path / "bare")
    with pytest.raises(ConfigError, match="nothing here says which model it was trained on; give model="):
        load_session(bare)
    found = load_session(bare, model=str(model_folder))
    assert found.data is None
    with pytest.raises(ConfigError, match="nothing here says which text it was trained on; give source="):
        found.tokens(10)
    with pytest.raises(ModelError, match=r"was trained on no/such-model, which does not load; give model= \("):
        load_session(saved(tmp_path / "gone", model={"name": "no/such-model"}))
    with pytest.raises(ConfigError, match="its files do not say which hook it reads; give it with hook="):
        load_session(saved(tmp_path / "somewhere", reads=("input",)), model=str(model_folder))
    assert load_session(tmp_path / "somewhere", model=str(model_folder), hook=HOOK).coder.config.writes == (HOOK,)
    with pytest.raises(ModelError, match=r"reads 16 values at blocks.1.mlp_act, which is 64 wide"):
        load_session(bare, model=str(model_folder), hook="blocks.1.mlp_act")
    short = tmp_path / "short.txt"
    short.write_text("few words", encoding="utf-8")
    with pytest.raises(DataError, match=r"short.txt: too little text for one context of 64 tokens"):
        load_session(bare, model=str(model_folder), source=str(short)).tokens(64)


@pytest.mark.slow
def test_a_trained_run_comes_back(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    """The coder of a run knows its model and its text: what it says again is what it was trained on."""
    from unmix.data import TokenShards

    tree = {
        "model": {"name": str(model_folder), "dtype": "float32"},
        "data": {"source": str(texts), "tokens": 12_000, "context": 32},
        "coder": {"hook": HOOK, "n_latents": 32, "k": 4},
        "train": {"epochs": 1, "batch": 256, "init_rows": 256},
        "out": str(tmp_path / "run"),
    }
    unmix.train(unmix.TrainConfig.model_validate(tree))
    shards = TokenShards.open(tmp_path / "run" / "tokens")
    found = load_session(next((tmp_path / "run" / "coders").iterdir()), dtype="float32")
    trained = shards.tokens(shards.contexts_of("train"))
    assert np.array_equal(found.tokens(trained.size, role="train").numpy(), trained)
