"""The model that comes out: it learns, loads everywhere, and is refused where its settings changed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import unmix
from unmix.core.errors import DataError, ModelError, NonFiniteError, ResumeError
from unmix.data.shards import TokenShards
from unmix.data.tokenise import role_of
from unmix.train.language import tokenizer as tokenizer_module
from unmix.train.language.config import SampleConfig
from unmix.train.language.network import fresh_model
from unmix.train.language.sample import draw
from unmix.train.language.tokenizer import make_tokenizer
from unmix.train.language.trainer import LanguageTrainer, next_token_loss
from unmix.train.language.walk import LanguageResult, train_language

from .toys import language_config

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "kv_heads": 1, "tied": False},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def result(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageResult:
    """A finished training of each family."""
    return train_language(language_config(text, tmp_path_factory.mktemp("lm"), model=FAMILIES[request.param]))


def trainer(text: Path, out: Path, **sections: Any) -> LanguageTrainer:
    """One that has taken no step."""
    config = language_config(text, out, **sections)
    tokenizer = make_tokenizer(config.tokenizer, config.data, out / "tokenizer")
    shards = out / "tokens"
    from unmix.data.tokenise import tokenise

    opened = TokenShards.open(shards) if shards.exists() else tokenise(config.data, tokenizer, shards)
    return LanguageTrainer(fresh_model(config, tokenizer), opened, config, out, "key")


def test_it_learns(result: LanguageResult) -> None:
    """Ten steps take it well below a uniform guess, on text that it has not seen."""
    figures = result.figures
    assert figures["held_out_loss"] < math.log(figures["vocabulary"]) - 0.5
    assert figures["perplexity"] == pytest.approx(math.exp(figures["held_out_loss"]))
    assert (figures["steps"], figures["tokens"], figures["vocabulary"]) == (10, 2560, 300)
    assert len(result.samples) == 2
    assert result.samples[1].startswith("The ")


def test_transformers_and_unmix_load_it(result: LanguageResult) -> None:
    """The held-out loss of what was saved, computed by others, is the one that was reported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    written = "Résumé of a naïve\ttest  ☃"
    assert tokenizer.decode(tokenizer(written)["input_ids"]) == written
    shards = TokenShards.open(result.folder / "tokens")
    ids = shards.contexts_of("evaluate")[:8]
    tokens = torch.from_numpy(shards.tokens(ids).astype(np.int64))
    with torch.no_grad():
        found = model(input_ids=tokens, labels=tokens).loss
    assert float(found) == pytest.approx(result.figures["held_out_loss"], abs=1e-5)
    lm = unmix.load_model(result.model, dtype="float32")
    assert lm.n_layers == 2
    assert lm.capture("some text", "layers.1")["layers.1"].shape[-1] == 16
    assert torch.allclose(lm.logits(tokens), model(input_ids=tokens).logits, atol=1e-5)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == (result.figures["parameters"] < 12_000)


def test_what_is_done_is_given_back_and_changes_are_named(
    result: LanguageResult, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = json.loads((result.model / "config.json").read_text(encoding="utf-8"))["model_type"]
    same = {"model": FAMILIES[family]}
    monkeypatch.setattr(LanguageTrainer, "__init__", None)
    again = train_language(language_config(text, result.folder, **same, train={"log_every": 1}))
    assert (again.figures, again.samples) == (result.figures, result.samples)
    message = r"was made with other settings \(train.lr: 0.01 → 0.1; seed: 0 → 1\); choose another folder or remove"
    with pytest.raises(ResumeError, match=message):
        train_language(language_config(text, result.folder, **same, train={"lr": 0.1}, seed=1))


def test_the_tokenizer_has_not_seen_what_is_held_out(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    config = language_config(text, tmp_path, data={"roles": {"train": 0.5, "evaluate": 0.5}})
    seen: list[str] = []
    inner = tokenizer_module._texts
    monkeypatch.setattr(tokenizer_module, "_texts", lambda *given: iter(seen.extend(inner(*given)) or seen))
    make_tokenizer(config.tokenizer, config.data, tmp_path / "t")
    assert {role_of(hashlib.sha256(one.encode()).digest(), config.data) for one in seen} == {"train"}
    lengths = sum(len(one) for one in seen)
    assert lengths - len(seen[-1]) < config.tokenizer.characters <= lengths


def test_a_tokenizer_that_exists(text: Path, tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    config = language_config(text, tmp_path, tokenizer={"name": str(tiny_tokenizer_folder)})
    made = make_tokenizer(config.tokenizer, config.data, tmp_path / "t")
    assert len(made) == 512
    model = fresh_model(config, made)
    assert (model.config.vocab_size, model.config.bos_token_id) == (512, made.bos_token_id)
    missing = language_config(text, tmp_path, tokenizer={"name": str(tmp_path / "none" / "of" / "it")})
    with pytest.raises(ModelError, match=r"tokenizer of .*none/of/it"):
        make_tokenizer(missing.tokenizer, missing.data, tmp_path / "u")


def test_too_little_text_is_said(text: Path, tmp_path: Path) -> None:
    config = language_config(text, tmp_path, tokenizer={"vocab_size": "60k"})
    with pytest.raises(DataError, match=r"gives a vocabulary of \d+ tokens, fewer than tokenizer.vocab_size = 60000"):
        make_tokenizer(config.tokenizer, config.data, tmp_path / "t")
    with pytest.raises(DataError, match=r"contexts to train on, fewer than the 1000 of one step; give more text or a"):
        trainer(text, tmp_path, train={"batch": 32_000})


def test_the_loss_is_of_the_next_token() -> None:
    tokens = torch.randint(7, (2, 5))
    logits = torch.randn(2, 5, 7)
    expected = torch.stack(
        [-functional.log_softmax(logits[b, p], -1)[tokens[b, p + 1]] for b in range(2) for p in range(4)]
    ).mean()
    assert torch.allclose(next_token_loss(logits, tokens), expected)


def test_first_weights_come_from_the_seed_alone(text: Path, tmp_path: Path) -> None:
    one, same = trainer(text, tmp_path / "a"), trainer(text, tmp_path / "a")
    torch.manual_seed(77)
    other = trainer(text, tmp_path / "b", seed=1)
    for p, q, r in zip(one.model.parameters(), same.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.ndim < 2 or not torch.equal(p, r)


def test_parts_of_a_step_add_up(text: Path, tmp_path: Path) -> None:
    """`accumulate` changes memory, not the step."""
    whole = trainer(text, tmp_path)
    parts = trainer(text, tmp_path, train={"accumulate": 4})
    for _ in range(2):
        assert whole.step() == pytest.approx(parts.step(), rel=1e-4)


def test_matrices_alone_are_decayed(text: Path, tmp_path: Path) -> None:
    groups = trainer(text, tmp_path, train={"weight_decay": 0.3}).optimiser.param_groups
    assert [(group["weight_decay"], {p.ndim >= 2 for p in group["params"]}) for group in groups] == [
        (0.3, {True}), (0.0, {False}),
    ]  # fmt: skip


def test_bfloat16_computes_in_bfloat16(text: Path, tmp_path: Path) -> None:
    """Weights stay float32, and the loss is near that of float32."""
    half, full = trainer(text, tmp_path, train={"dtype": "bfloat16"}), trainer(text, tmp_path)
    found, expected = half.step()["loss"], full.step()["loss"]
    assert found == pytest.approx(expected, rel=0.01)
    assert found != expected
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_documents_are_kept_apart_where_the_policy_says_so(text: Path, tmp_path: Path) -> None:
    """What the model makes of a document does not depend on the ones packed before it; by default it does."""
    one = trainer(text, tmp_path, data={"policy": {"attend_across": False}})
    rows = one.shards.documents(one.shards.contexts_of("train"))
    several = np.flatnonzero(rows[:, 0] != rows[:, -1])[:1]
    last = int(np.flatnonzero(rows[several[0]] == rows[several[0], -1])[0])
    tokens = torch.from_numpy(one.shards.tokens(several).astype(np.int64))
    one.model.eval()
    logits = one.model(input_ids=tokens, use_cache=False, **one._apart(several)).logits
    alone = one.model(input_ids=tokens[:, last:], use_cache=False).logits
    assert torch.allclose(logits[:, last:], alone, atol=1e-5)
    leaking = one.model(input_ids=tokens, use_cache=False).logits[:, last:]
    assert not torch.allclose(leaking, alone, atol=1e-4)
    assert torch.allclose(one._loss(several), next_token_loss(logits, tokens))
    assert trainer(text, tmp_path / "across")._apart(several) == {}


def test_a_loss_that_is_not_finite_stops_before_the_step(text: Path, tmp_path: Path) -> None:
    one = trainer(text, tmp_path)
    with torch.no_grad():
        next(one.model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"the loss is nan and the gradient's norm nan at step 1; nothing of this"):
        one.step()
    assert one.progress.step == 0


def test_a_checkpoint_of_something_else_is_refused(text: Path, tmp_path: Path) -> None:
    one = trainer(text, tmp_path)
    one.step()
    one.checkpoint()
    assert trainer(text, tmp_path).progress.step == 1
    with pytest.raises(ResumeError, match=r"checkpoint: was made with other settings or text"):
        LanguageTrainer(one.model, one.shards, one.config, tmp_path, "other")


def test_tokens_are_drawn_from_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    random = torch.Generator().manual_seed(0)
    assert draw(logits, SampleConfig(temperature=0), random) == 1
    assert {draw(logits, SampleConfig(top_k=2, temperature=1.0), random) for _ in range(50)} == {1, 2}
    assert {draw(logits, SampleConfig(top_k=None, temperature=5.0), random) for _ in range(200)} == {0, 1, 2, 3}
