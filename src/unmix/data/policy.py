"""An input policy with its ids filled in from a tokenizer."""

from __future__ import annotations

from typing import Any

from unmix.core.errors import DataError
from unmix.core.policy import InputPolicy

END_OF_TEXT = "<|endoftext|>"
"""Chat models name their end-of-turn token as `eos`; where this token exists too, it is the one between documents."""


def resolve_policy(policy: InputPolicy, tokenizer: Any) -> InputPolicy:
    """`policy` with `bos_id` and `separator_id` set.

    Ids that are given are checked against the vocabulary; others are the tokenizer's own begin-of-sequence and
    end-of-text ids. `bos_id` stays `None` where `bos` is none. Raises `DataError` where the tokenizer has no such id.
    """
    bos = policy.bos_id
    if policy.bos != "none" and bos is None:
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise DataError(
                f"the tokenizer has no begin-of-sequence id, which policy.bos={policy.bos!r} needs; "
                "set policy.bos_id, or policy.bos to 'none'"
            )
    separator = policy.separator_id if policy.separator_id is not None else end_of_text_id(tokenizer)
    if separator is None:
        raise DataError("the tokenizer has no end-of-text id to put between documents; set policy.separator_id")
    resolved = policy.model_copy(update={"bos_id": None if policy.bos == "none" else bos, "separator_id": separator})
    size = vocabulary_size(tokenizer)
    named = {"bos_id": resolved.bos_id, "separator_id": separator}
    for name, value in [*named.items(), *(("skip_ids", token) for token in policy.skip_ids)]:
        if value is not None and (value < 0 or (size is not None and value >= size)):
            allowed = "0 or more" if size is None else f"0 to {size - 1}"
            raise DataError(f"policy.{name}: {value} is not in the tokenizer's vocabulary; allowed {allowed}")
    return resolved


def end_of_text_id(tokenizer: Any) -> int | None:
    """The id of `<|endoftext|>` where the vocabulary has it, else the tokenizer's `eos`, else `None`."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    if END_OF_TEXT in vocabulary:
        return int(vocabulary[END_OF_TEXT])
    return getattr(tokenizer, "eos_token_id", None)


def vocabulary_size(tokenizer: Any) -> int | None:
    """How many ids the tokenizer can give, added tokens included; `None` where it does not say."""
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    return getattr(tokenizer, "vocab_size", None)
