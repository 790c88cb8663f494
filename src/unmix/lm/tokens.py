"""Text to token ids under an `InputPolicy`, and token ids to strings that hide nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmix.core.errors import ModelError
from unmix.core.policy import InputPolicy

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def bos_id(tokenizer: Any, policy: InputPolicy) -> int | None:
    """The id that opens a text under `policy`; `None` where it opens with nothing.

    `ModelError` where the policy wants one and neither it nor the tokenizer has any.
    """
    if policy.bos == "none":
        return None
    found = policy.bos_id if policy.bos_id is not None else tokenizer.bos_token_id
    if found is None:
        raise ModelError(
            f"the input policy wants a begin-of-sequence token (bos: {policy.bos}) and this tokenizer has none; "
            "give bos_id, or set bos: none"
        )
    return int(found)


def default_policy(tokenizer: Any) -> InputPolicy:
    """What a text is fed under when nothing is said: a BOS where the tokenizer has one."""
    return InputPolicy(bos="none" if tokenizer.bos_token_id is None else "context")


def encode_text(tokenizer: Any, text: str, policy: InputPolicy) -> Int[Tensor, " pos"]:
    """Token ids of one text, int64. Special tokens come from `policy` alone, never from the tokenizer's habits."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = bos_id(tokenizer, policy)
    ids = ids if start is None else [start, *ids]
    if not ids:
        raise ModelError("the text is empty and the input policy adds no token: there is nothing to run")
    return torch.tensor(ids, dtype=torch.int64)


def policy_mask(tokens: Int[Tensor, "batch pos"], policy: InputPolicy, start: int = 0) -> Bool[Tensor, "batch pos"]:
    """True where a position counts under `policy`.

    `start` is the place of `tokens[:, 0]` in its context: above 0 where a cache holds what came before.
    """
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    mask = (positions >= policy.skip_first).expand(tokens.shape)
    if policy.skip_ids:
        mask = mask & ~torch.isin(tokens, torch.tensor(policy.skip_ids, device=tokens.device))
    return mask


def document_positions(documents: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """int64 place of each token inside its document; documents are runs of one id inside a row."""
    batch, length = documents.shape
    index = torch.arange(length, device=documents.device).expand(batch, length)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - (index * starts).cummax(dim=1).values


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in set(shown))
    return {**table, **{chr(256 + n): byte for n, byte in enumerate(hidden)}}


def show_bytes(data: bytes) -> str:
    """UTF-8 text; a byte that is only part of a character is shown as `\\xe2`."""
    return data.decode("utf-8", errors="backslashreplace")


class TokenStrings:
    """One display string per token id: exact text with its spaces and newlines.

    Byte-level BPE tokens are turned back into bytes, sentencepiece's `▁` into a space and `<0x0A>` into its byte.
    Special and added tokens are shown as they are written. Ids that the tokenizer does not know (padding rows of
    an embedding) are shown as `<id 49200>`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._kind = _vocabulary_kind(tokenizer)
        self._alphabet = byte_alphabet() if self._kind == "bytes" else {}
        self._size = len(tokenizer)

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """Display strings of `ids`."""
        wanted = [int(i) for i in ids]
        known = [i for i in wanted if 0 <= i < self._size and i not in self._added]
        tokens: Sequence[str | None] = self._tokenizer.convert_ids_to_tokens(known)
        shown = {i: f"<id {i}>" if token is None else self._show(token) for i, token in zip(known, tokens)}
        return [self._added.get(i) or shown.get(i, f"<id {i}>") for i in wanted]

    def _show(self, token: str) -> str:
        if self._kind == "bytes":
            if all(char in self._alphabet for char in token):
                return show_bytes(bytes(self._alphabet[char] for char in token))
            return token
        if self._kind == "pieces":
            if match := _BYTE_TOKEN.match(token):
                return show_bytes(bytes([int(match[1], 16)]))
            return token.replace("▁", " ")
        return token


def _vocabulary_kind(tokenizer: Any) -> str:
    """`bytes` for byte-level BPE, `pieces` for sentencepiece-like vocabularies, else `plain`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        described = json.dumps([parts.get("decoder"), parts.get("pre_tokenizer"), parts.get("normalizer")])
        if '"ByteLevel"' in described:
            return "bytes"
        if '"Metaspace"' in described or "▁" in described or "\\u2581" in described or '"ByteFallback"' in described:
            return "pieces"
        return "plain"
    vocabulary = tokenizer.get_vocab()
    if any(token.startswith("Ġ") for token in vocabulary):
        return "bytes"
    return "pieces" if any(token.startswith("▁") for token in vocabulary) else "plain"
