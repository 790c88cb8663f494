"""Text to packed shards of tokens, each document in one role (decision 14)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from unmix.core.atomic import atomic_folder
from unmix.core.config import semantic_hash
from unmix.core.errors import DataError
from unmix.core.manifest import write_manifest
from unmix.core.policy import InputPolicy
from unmix.core.progress import task
from unmix.core.seeds import derive
from unmix.data.chat import ChatRenderer, Spoken
from unmix.data.chat_rows import spoken_row
from unmix.data.config import ROLES, ChatConfig, DataConfig, Role
from unmix.data.corpora import find_source
from unmix.data.ids import CutRow, as_document, checked_ids, cut_row
from unmix.data.pack import RolePacker
from unmix.data.policy import resolve_policy, vocabulary_size
from unmix.data.shards import KIND, TokenShards
from unmix.data.sources.base import Document

log = logging.getLogger("unmix")

Tokenizer = Callable[..., Any]
"""Called as `tokenizer(texts, add_special_tokens=False)`; gives `input_ids`, a list of ids for each text."""

_BATCH_DOCUMENTS = 128
_BATCH_CHARACTERS = 2_000_000


def tokenise(config: DataConfig, tokenizer: Tokenizer, folder: str | Path, progress: bool = True) -> TokenShards:
    """Take `config.tokens` tokens from `config.source`, packed per role, into a new folder of shards.

    Deterministic in (config, tokenizer, text). A document's role depends on the hash of its text and the seed; a text
    seen before is dropped; documents of a role that is full are passed over. The folder appears whole or not at all.
    Where `config.tokenised` says that the source holds ids, the tokenizer gives no more than its special ids and the
    size of its vocabulary, and a role is that of a stored row.

    Raises `DataError` where the source cannot be used, the tokenizer lacks an id that the policy needs, a stored id is
    not in its vocabulary, or the text does not fill one context of every role.
    """
    folder = Path(folder)
    source = find_source(config)
    policy = resolve_policy(config.policy, tokenizer)
    first = next(documents := source.documents(), None)
    if first is None:
        raise DataError(f"{config.source}: no text in any document")
    with _no_new_parents(folder), atomic_folder(folder) as temp:
        total = sum(config.budgets().values()) * config.context
        with task("tokenise", total) if progress else nullcontext() as bar:
            taker = _Taker(config, policy, tokenizer, temp)
            try:
                for batch in _batches(chain([first], documents)):
                    taken = taker.take(batch)
                    if bar is not None:
                        bar.advance(taken)
                    if taker.full:
                        break
                roles = taker.close()
            finally:
                taker.abandon()
        _check_roles(config, roles, taker)
        text_hash, tokenizer_id = taker.text.hexdigest(), tokenizer_hash(tokenizer)
        report = {
            **source.report(),
            "sha256": text_hash,
            "documents": taker.documents,
            "characters": taker.characters,
            "tokens": sum(entry["contexts"] for entry in roles.values()) * config.context,
            "duplicates_dropped": taker.duplicates,
            "passed_over": taker.passed_over,
            **({} if config.tokenised is None else {"left_over": taker.left_over}),
        }
        write_manifest(
            temp,
            KIND,
            config=config.model_dump(mode="json"),
            policy=policy.model_dump(mode="json"),
            roles=roles,
            dtype=np.dtype(taker.dtype).name,
            tokenizer={"sha256": tokenizer_id, "size": vocabulary_size(tokenizer)},
            hash=semantic_hash(config, policy, tokenizer_id, text_hash),
            source_report=report,
        )
    return TokenShards.open(folder)


def role_of(digest: bytes, config: DataConfig) -> Role:
    """The role of the document whose text has this SHA-256: the same for every run with this seed and these shares."""
    point = derive(config.seed, "role", digest.hex()) / 2.0**63
    edge = 0.0
    shares: list[tuple[Role, float]] = [(role, config.roles[role]) for role in ROLES if config.roles.get(role, 0.0) > 0]
    for role, share in shares:
        edge += share
        if point < edge:
            return role
    return shares[-1][0]


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of what decides the tokenizer's ids: its whole definition where it has one, else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        vocabulary = getattr(tokenizer, "get_vocab", dict)()
        text = json.dumps([type(tokenizer).__qualname__, sorted(vocabulary.items())])
    return hashlib.sha256(text.encode()).hexdigest()


class _Taker:
    """Sorts batches of documents into the packers of their roles."""

    def __init__(self, config: DataConfig, policy: InputPolicy, tokenizer: Tokenizer, folder: Path) -> None:
        self._size = size = vocabulary_size(tokenizer)
        self.dtype = np.uint16 if size is not None and size <= 2**16 else np.uint32
        self.documents = self.characters = self.duplicates = self.passed_over = self.left_over = 0
        self.text = hashlib.sha256()
        self._config, self._policy, self._tokenizer = config, policy, tokenizer
        self._seen: set[bytes] = set()
        self._speakers: Speakers | None = (
            Speakers(config, policy, tokenizer) if isinstance(config, ChatConfig) else None
        )
        self._packers = {
            role: RolePacker(
                folder,
                role,
                contexts,
                config.context,
                policy,
                self.dtype,
                config.shard_tokens,
                spoken=isinstance(config, ChatConfig),
            )
            for role, contexts in config.budgets().items()
        }

    @property
    def full(self) -> bool:
        return all(packer.full for packer in self._packers.values())

    def take(self, batch: list[Document]) -> int:
        """Tokenise and pack the documents whose roles have room; how many tokens were added."""
        wanted: list[tuple[Document, bytes, RolePacker]] = []
        for document in batch:
            digest = document.digest
            if digest in self._seen:
                self.duplicates += 1
                continue
            self._seen.add(digest)
            packer = self._packers[role_of(digest, self._config)]
            if packer.full:
                self.passed_over += 1
            else:
                wanted.append((document, digest, packer))
        added = 0
        rows = self._rows([document for document, _, _ in wanted])
        for (document, digest, packer), ids in zip(wanted, rows, strict=True):
            if isinstance(ids, CutRow):
                taken = packer.add_contexts(ids, document, digest)
                self.left_over += ids.left_over
            elif isinstance(ids, Spoken):
                taken = packer.add(ids.ids, document, digest, ids.speakers)
            else:
                taken = packer.add(ids, document, digest)
            if taken == 0:
                self.passed_over += 1
                continue
            added += taken
            self.text.update(digest)
            self.documents += 1
            self.characters += len(document.text)
        return added

    def _rows(self, documents: list[Document]) -> list[list[int]] | list[CutRow] | list[Spoken]:
        """What is packed of each document: its ids, or the contexts that its row is cut into."""
        policy, kind = self._policy, self._config.tokenised
        if self._speakers is not None:
            return [self._speakers(document, self._size) for document in documents]
        if kind is None:
            return token_ids(self._tokenizer, [document.text for document in documents])
        stored = [checked_ids(document, self._size) for document in documents]
        if kind == "documents":
            return [as_document(ids, policy) for ids in stored]
        return [cut_row(ids, policy, self._config.context) for ids in stored]

    def close(self) -> dict[str, Any]:
        return {role: packer.close() for role, packer in self._packers.items()}

    def abandon(self) -> None:
        for packer in self._packers.values():
            packer.abandon()


class Speakers:
    """Conversations to ids with speakers, rendered here or stored."""

    def __init__(self, config: ChatConfig, policy: InputPolicy, tokenizer: Tokenizer) -> None:
        self._policy = policy
        self._render = None if config.chat.stored else ChatRenderer(tokenizer, config.chat)

    def __call__(self, document: Document, size: int | None) -> Spoken:
        """One conversation, without the BOS before it and the separator behind: packing puts them.

        A BOS that stands inside too is no such one: some models begin every turn with what they call BOS.
        """
        spoken = Spoken(*spoken_row(document)) if self._render is None else self._render(document)
        ids, speakers = spoken.ids, spoken.speakers
        if self._render is None:
            checked_ids(replace(document, ids=tuple(ids)), size)
        first = 1 if ids and ids[0] == self._policy.bos_id and ids.count(ids[0]) == 1 else 0
        last = len(ids) - (len(ids) > first and ids[-1] == self._policy.separator_id)
        return Spoken(ids[first:last], speakers[first:last])


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text, with no special tokens, never truncated or padded.

    A fast tokenizer's Rust core is called itself: it works on all threads, makes no masks, and does not warn that a
    document is longer than the model's window.
    """
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    result = tokenizer(texts, add_special_tokens=False)
    return result.input_ids if hasattr(result, "input_ids") else result["input_ids"]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + len(document.ids or ())
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_roles(config: DataConfig, roles: dict[str, Any], taker: _Taker) -> None:
    """Every role with a share has a context, or `DataError`; a budget that was not met is logged."""
    tokens = sum(entry["contexts"] for entry in roles.values()) * config.context
    empty = [role for role, entry in roles.items() if entry["contexts"] == 0]
    if empty:
        held = "" if config.tokenised is not None else f" of {taker.characters} characters"
        raise DataError(
            f"{config.source}: too little text: {taker.documents} documents{held} leave "
            f"{', '.join(empty)} without one context of {config.context} tokens; "
            "give more text, a shorter context or fewer roles"
        )
    if tokens < 0.99 * config.tokens - config.context * len(roles):
        log.warning("%s: all of the text gives %d of the %d tokens asked for", config.source, tokens, config.tokens)
    if taker.left_over > 0.1 * (tokens + taker.left_over):
        log.warning(
            "%s: %d ids are left out, since contexts of %d do not divide its rows", config.source, taker.left_over,
            config.context,
        )  # fmt: skip


@contextmanager
def _no_new_parents(folder: Path) -> Generator[None]:
    """On failure, remove the parents of `folder` that did not exist before and are empty."""
    new = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in new:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise
