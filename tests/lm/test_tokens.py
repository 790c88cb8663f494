"""Text in and out: special tokens from the policy alone, display strings that hide nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy
from unmix.lm import LanguageModel
from unmix.lm.tokens import TokenStrings, byte_alphabet, default_policy, encode_text, show_bytes

from .families import raw_model

TEXT = "The capital of France\n  isn't naïve 日本語 🎉\tend."


def byte_level(**special: Any) -> Any:
    """GPT-2's kind, trained on nothing: one token a byte."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "<|end of text|>"]
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def sentence_pieces() -> Any:
    """Llama's kind: ▁ for spaces, <0xE6> for bytes outside the vocabulary."""
    words = ["<unk>", "<s>", "▁", "▁The", "▁capital", "\n", "n", "a", "▁▁"]
    vocab = {piece: i for i, piece in enumerate([*words, *[f"<0x{b:02X}>" for b in range(256)]])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def test_byte_level_strings_join_to_the_text() -> None:
    tokenizer = byte_level()
    shown = TokenStrings(tokenizer)
    ids = encode_text(tokenizer, "The capital\n of France isn't", InputPolicy(bos="none")).tolist()
    assert "".join(shown(ids)) == "The capital\n of France isn't"
    assert all("Ġ" not in s and "Ċ" not in s for s in shown(ids))


def test_parts_of_a_character_are_shown_as_bytes() -> None:
    tokenizer = byte_level()
    back = {byte: char for char, byte in byte_alphabet().items()}
    ids = tokenizer.convert_tokens_to_ids([back[b] for b in "日 \n".encode()])
    assert TokenStrings(tokenizer)(ids) == ["\\xe6", "\\x97", "\\xa5", " ", "\n"]


def test_special_tokens_and_unknown_ids() -> None:
    tokenizer = byte_level(bos_token="<s>")
    shown = TokenStrings(tokenizer)
    assert shown([0, 1, 10_000, -1]) == ["<s>", "<|end of text|>", "<id 10000>", "<id -1>"]
    assert shown([]) == []


def test_sentence_piece_strings() -> None:
    tokenizer = sentence_pieces()
    ids = tokenizer.convert_tokens_to_ids(["▁The", "▁▁", "\n", "<0x0A>", "<0xE6>", "<s>", "n"])
    assert TokenStrings(tokenizer)(ids) == [" The", "  ", "\n", "\n", "\\xe6", "<s>", "n"]


def test_bytes_alphabet_is_the_one_of_the_tokenizers_library() -> None:
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert show_bytes("é".encode()) == "é"


def test_special_tokens_come_from_the_policy_alone() -> None:
    tokenizer = byte_level(bos_token="<s>")
    plain = encode_text(tokenizer, "The", InputPolicy(bos="none")).tolist()
    assert encode_text(tokenizer, "The", InputPolicy()).tolist() == [0, *plain]
    assert encode_text(tokenizer, "The", InputPolicy(bos="document", bos_id=1)).tolist() == [1, *plain]
    assert default_policy(tokenizer).bos == "context"
    assert default_policy(byte_level()).bos == "none"


def test_a_bos_that_does_not_exist_and_an_empty_text() -> None:
    with pytest.raises(
        ModelError, match=r"wants a begin-of-sequence token \(bos: context\) and this tokenizer has none"
    ):
        encode_text(byte_level(), "The", InputPolicy())
    with pytest.raises(ModelError, match="the text is empty"):
        encode_text(byte_level(), "", InputPolicy(bos="none"))


def test_a_language_model_with_a_tokenizer() -> None:
    tokenizer = byte_level(bos_token="<s>", eos_token="<|end of text|>")
    lm = LanguageModel(raw_model("llama", vocab_size=320).requires_grad_(False), "with-text", tokenizer)
    ids = lm.encode_text("The capital\n isn't")
    assert lm.decode(ids) == "<s>The capital\n isn't"
    assert "".join(lm.token_strings(ids)) == "<s>The capital\n isn't"
    acts = lm.capture("The capital\n isn't", "layers.1")["layers.1"]
    assert torch.equal(acts, lm.capture(ids, "layers.1")["layers.1"])
    without = lm.capture("The", "layers.1", policy=InputPolicy(bos="none"))["layers.1"]
    assert without.shape[1] == len(lm.encode_text("The")) - 1
    assert lm.stop_ids == (2,)
