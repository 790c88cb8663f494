"""The tokenizer of a small language model: byte-level BPE trained on its text, or one that exists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unmix.core.atomic import atomic_folder
from unmix.core.errors import DataError
from unmix.core.manifest import MANIFEST, require_whole, write_manifest
from unmix.data.corpora import open_corpus
from unmix.data.policy import END_OF_TEXT
from unmix.data.tokenise import role_of
from unmix.lm.load import explain_failure
from unmix.train.language.config import TextConfig, TokenizerConfig

KIND = "tokenizer"


def make_tokenizer(config: TokenizerConfig, data: TextConfig, folder: Path) -> Any:
    """The tokenizer in `folder`, put there first where it is not there yet.

    A trained one begins and ends texts with the same token, `<|endoftext|>`, as GPT-2's does.
    """
    from transformers import AutoTokenizer

    if not (folder / MANIFEST).is_file():
        made = load_tokenizer(config.name) if config.name is not None else train_tokenizer(config, data)
        with atomic_folder(folder) as temp:
            made.save_pretrained(temp)
            write_manifest(temp, KIND)
    require_whole(folder, KIND, deep=True)
    return AutoTokenizer.from_pretrained(folder)


def load_tokenizer(name: str) -> Any:
    """A tokenizer by name or folder; `ModelError` or `ServiceError` where it cannot be had."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise explain_failure(error, f"tokenizer of {name}") from error


def train_tokenizer(config: TokenizerConfig, data: TextConfig) -> Any:
    """Byte-level BPE (Sennrich et al. 1508.07909, on GPT-2's bytes and splits) of the documents of role train."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(_texts(data, config.characters), trainer)
    found = bpe.get_vocab_size()
    if found < config.vocab_size:
        raise DataError(
            f"{data.source}: its text gives a vocabulary of {found} tokens, fewer than tokenizer.vocab_size = "
            f"{config.vocab_size}; give more text or ask for fewer"
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _texts(data: TextConfig, characters: int) -> Iterator[str]:
    """Documents of role train: what is held out stays unseen by the tokenizer too."""
    taken = 0
    for document in open_corpus(data):
        if role_of(document.digest, data) == "train":
            yield document.text
            taken += len(document.text)
            if taken >= characters:
                return
