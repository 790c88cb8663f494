"""Packed tokens on the disk, read through memory maps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from unmix.core.config import build
from unmix.core.errors import CorruptError, DataError
from unmix.core.manifest import require_whole
from unmix.core.policy import InputPolicy
from unmix.data.config import ROLES, ChatConfig, DataConfig, Role

KIND = "tokens"

Ids = Sequence[int] | np.ndarray


class TokenShards:
    """Contexts of exactly `context` tokens, numbered 0 … n−1: all of one role, then all of the next.

    Documents are numbered in the order of their contexts. Position p of context c is global position
    `c · context + p`, and a document runs from its `start` to the next one's.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        kind = ChatConfig if "chat" in manifest["config"] else DataConfig
        self.config: DataConfig = build(kind, manifest["config"], source=str(folder))
        self.policy = build(InputPolicy, manifest["policy"], source=str(folder))
        self.hash: str = manifest["hash"]
        self.tokenizer_hash: str = manifest["tokenizer"]["sha256"]
        self.source_report: dict[str, Any] = manifest["source_report"]
        self.context = self.config.context
        self.counts: dict[Role, int] = {role: entry["contexts"] for role, entry in manifest["roles"].items()}
        self.n_contexts = sum(self.counts.values())
        self.n_tokens = self.n_contexts * self.context
        self._dtype = np.dtype(manifest["dtype"])
        self._shards, self._first = self._open_shards(manifest["roles"], "shards", self._dtype)
        spoken = all("speakers" in entry for entry in manifest["roles"].values())
        speakers = self._open_shards(manifest["roles"], "speakers", np.dtype(np.uint8)) if spoken else ([], self._first)
        self._speakers = speakers[0]
        self._documents = _DocumentTable(folder, manifest["roles"], self.context)
        self.n_documents = len(self._documents.starts)

    @classmethod
    def open(cls, folder: str | Path) -> TokenShards:
        """Open a folder that `tokenise` made. `CorruptError` where a file is absent or of the wrong length or shape."""
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of token shards")
        return cls(folder, require_whole(folder, KIND))

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest; `CorruptError` names the first broken ones."""
        require_whole(self.folder, KIND, deep=True)

    @cached_property
    def roles(self) -> UInt8[np.ndarray, " contexts"]:
        """The role of each context: its place in `ROLES`."""
        return np.repeat(
            np.array([ROLES.index(role) for role in self.counts], dtype=np.uint8), list(self.counts.values())
        )

    def contexts_of(self, role: str) -> Int64[np.ndarray, " of_role"]:
        """The ids of a role's contexts, in their order."""
        if role not in ROLES:
            raise DataError(f"no role {role!r}; allowed: {', '.join(ROLES)}")
        return np.flatnonzero(self.roles == ROLES.index(role)).astype(np.int64)

    def tokens(self, ids: Ids) -> Int32[np.ndarray, "n context"]:
        """The tokens of these contexts."""
        return self._gather(self._shards, ids, np.dtype(np.int32))

    @property
    def spoken(self) -> bool:
        """Whether it is known who speaks at each position: these are chats."""
        return bool(self._speakers)

    def speakers(self, ids: Ids) -> UInt8[np.ndarray, "n context"]:
        """Who speaks at each position of these contexts, by place in `unmix.data.config.SPEAKERS`.

        `DataError` where the documents are no chats.
        """
        if not self.spoken:
            raise DataError(f"{self.folder}: these tokens were not made from chats, so nobody speaks in them")
        return self._gather(self._speakers, ids, np.dtype(np.uint8))

    def documents(self, ids: Ids) -> Int32[np.ndarray, "n context"]:
        """The document that each position belongs to. A separator belongs to the document that it ends."""
        wanted = self._checked(ids)
        positions = wanted[:, None] * self.context + np.arange(self.context)
        return (np.searchsorted(self._documents.starts, positions, side="right") - 1).astype(np.int32)

    def mask(self, ids: Ids) -> Bool[np.ndarray, "n context"]:
        """Which positions count: not the first `policy.skip_first` of a context, and none of `policy.skip_ids`."""
        tokens = self.tokens(ids)
        mask = np.ones(tokens.shape, dtype=bool)
        mask[:, : self.policy.skip_first] = False
        if self.policy.skip_ids:
            mask &= ~np.isin(tokens, self.policy.skip_ids)
        return mask

    def document(self, document: int) -> dict[str, Any]:
        """A document's `source`, `label`, `start` (global position) and `hash`.

        That is the SHA-256 of its text, or of the row of ids that it stood in.
        """
        if not 0 <= document < self.n_documents:
            raise DataError(f"no document {document}; this folder has {self.n_documents}, numbered from 0")
        return self._documents.entry(document)

    def labels(self) -> list[str | None]:
        """The label of every document, in order; reads every document's line once."""
        return self._documents.labels()

    def _gather(self, shards: list[np.ndarray], ids: Ids, dtype: np.dtype[Any]) -> np.ndarray:
        wanted = self._checked(ids)
        result = np.empty((len(wanted), self.context), dtype=dtype)
        shard_of = np.searchsorted(self._first, wanted, side="right") - 1
        for shard in np.unique(shard_of):
            here = shard_of == shard
            result[here] = shards[shard][wanted[here] - self._first[shard]]
        return result

    def _checked(self, ids: Ids) -> Int64[np.ndarray, " n"]:
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.n_contexts):
            bad = wanted[(wanted < 0) | (wanted >= self.n_contexts)][0]
            raise DataError(f"no context {bad}; this folder has {self.n_contexts}, numbered from 0")
        return wanted

    def _open_shards(
        self, roles: dict[str, Any], key: str, dtype: np.dtype[Any]
    ) -> tuple[list[np.ndarray], Int64[np.ndarray, " shards"]]:
        shards: list[np.ndarray] = []
        first: list[int] = []
        total = 0
        for entry in roles.values():
            for shard in entry[key]:
                shape = (shard["contexts"], self.context)
                shards.append(_open_array(self.folder / shard["file"], shape, dtype))
                first.append(total)
                total += shard["contexts"]
        return shards, np.array(first, dtype=np.int64)


class _DocumentTable:
    """Where documents start and what they are, over all roles; sources and labels are read when asked for."""

    def __init__(self, folder: Path, roles: dict[str, Any], context: int) -> None:
        starts: list[np.ndarray] = []
        self._first: list[int] = [0]
        self._files: list[tuple[Path, np.ndarray, np.ndarray]] = []
        base = 0
        for role, entry in roles.items():
            n = entry["documents"]
            starts.append(_open_array(folder / f"{role}.starts.npy", (n,), np.dtype(np.int64)) + base)
            hashes = _open_array(folder / f"{role}.hashes.npy", (n, 32), np.dtype(np.uint8))
            lines = _open_array(folder / f"{role}.lines.npy", (n + 1,), np.dtype(np.int64))
            self._files.append((folder / f"{role}.documents.jsonl", hashes, lines))
            self._first.append(self._first[-1] + n)
            base += entry["contexts"] * context
        self.starts = np.concatenate(starts)

    def labels(self) -> list[str | None]:
        found: list[str | None] = []
        for path, hashes, _ in self._files:
            with path.open("rb") as handle:
                for number, raw in zip(range(len(hashes)), handle, strict=False):
                    try:
                        found.append(json.loads(raw)["label"])
                    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
                        raise CorruptError(f"{path}: line {number + 1} does not describe a document") from error
        return found

    def entry(self, document: int) -> dict[str, Any]:
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        path, hashes, lines = self._files[part]
        row = document - self._first[part]
        with path.open("rb") as handle:
            handle.seek(int(lines[row]))
            raw = handle.read(int(lines[row + 1] - lines[row]))
        try:
            described = cast("dict[str, Any]", json.loads(raw))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CorruptError(f"{path}: byte {int(lines[row])}: not the line of document {document}") from error
        return {**described, "hash": bytes(hashes[row]).hex(), "start": int(self.starts[document])}


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The array in a `.npy` file, memory-mapped; `CorruptError` where it is not of this shape and dtype."""
    try:
        array = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CorruptError(f"{path}: not a readable .npy file ({error})") from error
    if array.shape != shape or array.dtype != dtype:
        raise CorruptError(f"{path}: {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}")
    return array
