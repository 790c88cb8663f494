"""Activations of a fixed list of contexts, chunk by chunk: read from a disk cache, or made by the model each time.

Contexts lie in the order of a keyed permutation, so every chunk is a fair sample of the whole; training shuffles
rows inside blocks of a few chunks (decision 13).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.core.atomic import atomic_file, sweep, write_json
from unmix.core.config import semantic_hash
from unmix.core.errors import ResumeError
from unmix.core.manifest import MANIFEST, require_whole, write_manifest
from unmix.core.progress import task
from unmix.core.seeds import derive, slug
from unmix.data.order import Order
from unmix.data.shards import TokenShards
from unmix.lm.model import LanguageModel
from unmix.train.timing import Clock

KIND = "activations"
CHUNK = 256
"""Contexts in a chunk: 32 k tokens at the default context."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}


class ActivationStore(Protocol):
    """Chunks of activations `{hook: [n, context, d]}` over a list of contexts."""

    contexts: np.ndarray
    """int64 context ids in slot order."""
    hooks: tuple[str, ...]
    hash: str

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        ...

    def chunk(self, i: int) -> dict[str, Tensor]:
        """Activations of slots `i·CHUNK` to `(i + 1)·CHUNK`."""
        ...


def permuted(contexts: np.ndarray, seed: int) -> np.ndarray:
    """`contexts` in the order of a keyed permutation."""
    ids = np.asarray(contexts, dtype=np.int64)
    return ids[Order(derive(seed, "contexts"), len(ids), len(ids)).batch(0, len(ids))] if len(ids) else ids


class LiveStore:
    """Runs the model for each chunk. Costs a forward pass an epoch and no disk. `clock` counts the model's time."""

    def __init__(
        self, lm: LanguageModel, shards: TokenShards, contexts: np.ndarray, hooks: tuple[str, ...], batch: int = 16
    ) -> None:
        self.lm, self.shards, self.batch, self.clock = lm, shards, batch, Clock()
        self.contexts, self.hooks = contexts, hooks
        self.hash = store_key(lm, shards, contexts, hooks)

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.contexts) // CHUNK)

    def chunk(self, i: int) -> dict[str, Tensor]:
        """Capture one chunk; batches are cut the same way every time."""
        ids = self.contexts[i * CHUNK : (i + 1) * CHUNK]
        parts: dict[str, list[Tensor]] = {hook: [] for hook in self.hooks}
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            with self.clock.on("model"):
                captured = self.lm.capture(
                    token_tensor(self.shards, part), list(self.hooks), self.shards.policy,
                    documents=torch.from_numpy(np.ascontiguousarray(self.shards.documents(part))),
                )  # fmt: skip
            for hook in self.hooks:
                parts[hook].append(captured[hook].to(self.lm.dtype))
        return {hook: torch.cat(kept) for hook, kept in parts.items()}


def token_tensor(shards: TokenShards, ids: np.ndarray) -> Int[Tensor, "n context"]:
    """int64 tokens of some contexts."""
    return torch.from_numpy(shards.tokens(ids).astype(np.int64))


def store_key(lm: LanguageModel, shards: TokenShards, contexts: np.ndarray, hooks: tuple[str, ...]) -> str:
    """Hash of everything that decides the activations."""
    model = lm.fingerprint.model_dump(mode="json")
    listed = hashlib.sha256(np.ascontiguousarray(contexts, dtype="<i8").tobytes()).hexdigest()
    return semantic_hash(model, str(lm.dtype), shards.hash, shards.policy, list(hooks), listed)


class CachedStore:
    """Activations on disk, memory-mapped: `HOOK/00000.bin`, … in the model's dtype, hashed by a manifest."""

    def __init__(self, folder: Path, deep: bool = False) -> None:
        """Open a whole cache; `CorruptError` names a chunk of wrong length, with `deep` also of wrong hash."""
        manifest = require_whole(folder, KIND, deep=deep)
        self.folder = folder
        self.hash: str = manifest["key"]
        self.hooks: tuple[str, ...] = tuple(manifest["hooks"])
        self.contexts = np.asarray(np.load(folder / "contexts.npy"), dtype=np.int64)
        self._context: int = manifest["context"]
        self._widths: dict[str, int] = manifest["widths"]
        self._dtype = _DTYPES[manifest["dtype"]]

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.contexts) // CHUNK)

    def chunk(self, i: int) -> dict[str, Tensor]:
        """Views of the memory map, in the stored dtype."""
        n = min(CHUNK, len(self.contexts) - i * CHUNK)
        result: dict[str, Tensor] = {}
        for hook in self.hooks:
            path = self.folder / slug(hook) / f"{i:05d}.bin"
            flat = np.memmap(path, dtype=np.uint8, mode="c")
            tensor = torch.from_numpy(flat).view(self._dtype)
            result[hook] = tensor.view(n, self._context, self._widths[hook])
        return result


def write_cache(live: LiveStore, folder: Path) -> CachedStore:
    """Run the model once over every chunk and keep the result; goes on where an earlier call was killed.

    Raises `ResumeError` where `folder` holds chunks of another model, text or hook.
    """
    if (folder / MANIFEST).is_file():
        store = CachedStore(folder)
        _same_key(folder, store.hash, live.hash)
        return store
    note = folder / "capture.json"
    if note.is_file():
        _same_key(folder, json.loads(note.read_text(encoding="utf-8"))["key"], live.hash)
    write_json(note, {"key": live.hash})
    with atomic_file(folder / "contexts.npy") as temp, temp.open("wb") as handle:
        np.save(handle, live.contexts)
    done = sum(1 for i in range(live.n_chunks) if _has_chunk(folder, live.hooks, i))
    per_chunk, total = CHUNK * live.shards.context, len(live.contexts) * live.shards.context
    with task("capture", total, done=min(done * per_chunk, total)) as bar:
        for i in range(live.n_chunks):
            if _has_chunk(folder, live.hooks, i):
                continue
            for hook, tensor in live.chunk(i).items():
                path = folder / slug(hook) / f"{i:05d}.bin"
                sweep(path)
                with atomic_file(path) as temp:
                    raw = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
                    raw.tofile(temp)
            bar.advance(min(per_chunk, total - bar.done))
    write_manifest(
        folder, KIND, key=live.hash, hooks=list(live.hooks), context=live.shards.context,
        widths={hook: live.lm.width(hook) for hook in live.hooks}, dtype=str(live.lm.dtype).removeprefix("torch."),
    )  # fmt: skip
    return CachedStore(folder)


def _has_chunk(folder: Path, hooks: tuple[str, ...], i: int) -> bool:
    return all((folder / slug(hook) / f"{i:05d}.bin").is_file() for hook in hooks)


def _same_key(folder: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ResumeError(
            f"{folder}: holds activations of another model, text or hook (key {found}, now {expected}); "
            f"choose another run folder or remove this one"
        )


def chunk_rows(chunk: Tensor) -> Float[Tensor, "rows d"]:
    """A chunk `[n, context, d]` seen as rows."""
    return chunk.reshape(-1, chunk.shape[-1])
