"""Packing: one role's documents into contexts of exactly `context` tokens, and onto the disk.

Files of a role: `ROLE-00000.npy …` (tokens, `[contexts, context]`), `ROLE.starts.npy` (where each document starts, in
positions from the role's first), `ROLE.hashes.npy` (SHA-256 of each text, or row of ids), `ROLE.documents.jsonl`
(source and label) and `ROLE.lines.npy` (the byte at which each of its lines starts). Of chats also
`ROLE.speaker-00000.npy …`: who speaks at each position, cut as the tokens are.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmix.core.errors import DataError
from unmix.core.policy import InputPolicy
from unmix.data.ids import CutRow
from unmix.data.sources.base import Document


class Stream:
    """Ids of one kind, cut into contexts and written as shards `NAME-00000.npy …`. Memory: one shard."""

    def __init__(self, folder: Path, name: str, context: int, lead: int | None, dtype: Any, shard_tokens: int) -> None:
        """`lead` stands before each context; `None`: nothing does."""
        self.contexts = 0
        self.shards: list[dict[str, Any]] = []
        self._folder, self._name, self._lead, self._dtype = folder, name, lead, dtype
        self._payload = context - (lead is not None)
        self._shard_contexts = max(shard_tokens // context, 1)
        self._held: list[np.ndarray] = []
        self._length = 0

    def append(self, row: np.ndarray) -> None:
        """Take some ids."""
        self._held.append(row)
        self._length += len(row)
        if self._length >= self._shard_contexts * self._payload:
            self.flush()

    def flush(self, last: bool = False) -> None:
        """Write the whole shards held, and with `last` the contexts after them."""
        if not self._held:
            return
        stream = np.concatenate(self._held)
        rows = stream[: len(stream) // self._payload * self._payload].reshape(-1, self._payload)
        count = len(rows) if last else len(rows) // self._shard_contexts * self._shard_contexts
        for start in range(0, count, self._shard_contexts):
            self._write(rows[start : min(start + self._shard_contexts, count)])
        rest = stream[count * self._payload :].copy()
        self._held, self._length = [rest], len(rest)

    def _write(self, rows: np.ndarray) -> None:
        name = f"{self._name}-{len(self.shards):05d}.npy"
        if self._lead is not None:
            rows = np.concatenate([np.full((len(rows), 1), self._lead, dtype=rows.dtype), rows], axis=1)
        np.save(self._folder / name, rows)
        self.shards.append({"file": name, "contexts": len(rows)})
        self.contexts += len(rows)


class RolePacker:
    """Takes documents of one role until its budget of contexts is full. Memory: one shard.

    Each document is followed by the separator; `bos="document"` puts BOS before each, `bos="context"` before each
    context. What overshoots the budget, and a last context that is not full, is dropped. With `spoken` each document
    comes with its speakers; BOS and separator are nobody's (0).
    """

    def __init__(
        self,
        folder: Path,
        role: str,
        contexts: int,
        context: int,
        policy: InputPolicy,
        dtype: Any,
        shard_tokens: int,
        spoken: bool = False,
    ) -> None:
        self.role, self.budget, self.context = role, contexts, context
        self._folder, self._dtype, self._policy = folder, dtype, policy
        self._lead = 1 if policy.bos == "context" else 0
        self._ids = Stream(folder, role, context, policy.bos_id if self._lead else None, dtype, shard_tokens)
        silent = 0 if self._lead else None
        self._speakers = Stream(folder, f"{role}.speaker", context, silent, np.uint8, shard_tokens) if spoken else None
        self._taken = 0
        self._starts = array("q")
        self._hashes = bytearray()
        self._lines = array("q", [0])
        self._documents = (folder / f"{role}.documents.jsonl").open("wb")

    @property
    def contexts(self) -> int:
        """Contexts written so far."""
        return self._ids.contexts

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Files written so far."""
        return self._ids.shards

    @property
    def full(self) -> bool:
        """Whether the role needs no more tokens."""
        return self._taken >= self.budget * (self.context - self._lead)

    def add(self, ids: list[int], document: Document, digest: bytes, speakers: Sequence[int] | None = None) -> int:
        """Append one document of token ids; how many tokens it added (0 once full)."""
        room = self.budget * (self.context - self._lead) - self._taken
        if room <= 0:
            return 0
        self._note(document, digest, self._taken)
        first = [self._policy.bos_id] if self._policy.bos == "document" else []
        try:
            row = np.array([*first, *ids, self._policy.separator_id], dtype=self._dtype)[:room]
        except OverflowError as error:
            raise DataError(f"the tokenizer gave the id {max(ids)}, beyond its own vocabulary size") from error
        if self._speakers is not None:
            spoken = [*(0 for _ in first), *(speakers or [0] * len(ids)), 0]
            self._speakers.append(np.array(spoken, dtype=np.uint8)[:room])
        return self._append(row)

    def add_contexts(self, row: CutRow, document: Document, digest: bytes) -> int:
        """Append whole contexts, with the documents that begin in them; how many tokens were added, BOS aside."""
        contexts = row.contexts[: self.budget - self._taken // (self.context - self._lead)]
        for start in row.starts[row.starts < contexts.size].tolist():
            self._note(document, digest, self._taken + start)
        return self._append(contexts.reshape(-1).astype(self._dtype))

    def close(self) -> dict[str, Any]:
        """Write what is left; the role's entry in the manifest."""
        self._ids.flush(last=True)
        self._documents.close()
        starts, lines = np.array(self._starts, dtype=np.int64), np.array(self._lines, dtype=np.int64)
        kept = int(np.searchsorted(starts, self.contexts * self.context))
        hashes = np.frombuffer(bytes(self._hashes), dtype=np.uint8).reshape(-1, 32)
        for name, values in {"starts": starts[:kept], "lines": lines[: kept + 1], "hashes": hashes[:kept]}.items():
            np.save(self._folder / f"{self.role}.{name}.npy", values)
        entry = {"contexts": self.contexts, "documents": kept, "shards": self.shards}
        if self._speakers is None:
            return entry
        self._speakers.flush(last=True)
        return {**entry, "speakers": self._speakers.shards}

    def abandon(self) -> None:
        """Close the open file without finishing."""
        self._documents.close()

    def _append(self, row: np.ndarray) -> int:
        self._ids.append(row)
        self._taken += len(row)
        return len(row)

    def _note(self, document: Document, digest: bytes, at: int) -> None:
        """Remember that a document starts `at` so many ids; at the start of a context it owns the BOS before it."""
        whole, inside = divmod(at, self.context - self._lead)
        self._starts.append(whole * self.context + (inside + self._lead if inside else 0))
        self._hashes += digest
        line = json.dumps({"source": document.source, "label": document.label}, ensure_ascii=False)
        self._lines.append(self._lines[-1] + self._documents.write(line.encode() + b"\n"))
