"""`IndexWriter`: streams encoded batches into an index folder that is whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from unmix.core.atomic import atomic_folder, disk_errors, write_json
from unmix.core.errors import ConfigError, DataError
from unmix.core.lock import folder_lock
from unmix.core.manifest import write_manifest
from unmix.data.config import ROLES
from unmix.index.checks import (
    CodesLike,
    check_batch,
    check_coders,
    check_sizes,
    check_slices,
    check_slicings,
    coder_folders,
    take_postings,
)
from unmix.index.layout import (
    DOCUMENTS,
    KIND,
    MASK,
    ROLE_BYTES,
    SEGMENT_TOKENS,
    TOKENS,
    CoderEntry,
    IndexMeta,
    Segment,
    open_raw,
    plain_meta,
    slice_file,
    write_raw,
)
from unmix.index.merge import TokenTable, merge_coder
from unmix.index.spill import BYTES_PER_POSTING, Buffer, Spill

DEFAULT_BUDGET = 2 * 2**30


class IndexWriter:
    """Writes the index of a token stream and of the codes of one or more coders over it.

    Everything is written in a hidden folder beside `folder`, which takes its place on `close()`; an exception,
    `abort()` or a kill leaves `folder` as it was. Batches may have any size and the result does not depend on
    it, nor on the budget.

    Args:
        folder: where the index shall be; an older index there is replaced when this one is whole.
        latents: number of latents of each coder, by coder name.
        context: positions in a context.
        meta: the builder's facts, plain JSON (coder hashes, tokenizer name, hash of the text …).
        vocab: display string of every token id; stored so that reading needs no tokenizer.
        vocab_size: number of token ids; default `len(vocab)`. Up to 65536 ids are stored in 16 bits.
        roles: names of the role numbers given to `add`.
        slices: slicings of the positions: name → names of its values, at most 256 (`speaker`: user, assistant …).
        budget_bytes: memory for buffered postings; when it is used up a sorted run is put on disk.
            One batch is always taken whole.
        segment_tokens: positions in one final segment, at most 2^32.

    Raises:
        ConfigError: a coder name, size or meta that cannot be used.
        ResumeError: another process is building an index at the same place.
    """

    def __init__(
        self,
        folder: str | Path,
        latents: Mapping[str, int],
        context: int,
        meta: Mapping[str, Any] | None = None,
        *,
        vocab: Sequence[str] | None = None,
        vocab_size: int | None = None,
        roles: Sequence[str] = ROLES,
        slices: Mapping[str, Sequence[str]] | None = None,
        budget_bytes: int = DEFAULT_BUDGET,
        segment_tokens: int = SEGMENT_TOKENS,
    ) -> None:
        self.folder = Path(folder)
        self.latents = dict(latents)
        self.context = context
        self.roles = tuple(roles)
        self.slices = {name: tuple(values) for name, values in (slices or {}).items()}
        self._folders = coder_folders(self.latents)
        check_sizes(context, self.roles, budget_bytes, segment_tokens)
        check_slicings(self.slices)
        self._meta = plain_meta(meta or {})
        self._vocab = list(vocab) if vocab is not None else None
        self._vocab_size = vocab_size if vocab_size is not None or vocab is None else len(vocab)
        small = self._vocab_size is not None and self._vocab_size <= 2**16
        self._token_dtype = np.dtype(np.uint16 if small else np.uint32)
        self._budget, self._segment_tokens = budget_bytes, segment_tokens
        self._n_contexts = 0
        self._counted = np.zeros(len(self.roles), np.int64)
        self._segments: list[Segment] = []
        self._segment_base = self._spill_base = 0
        self._buffers = {name: Buffer(n) for name, n in self.latents.items()}
        self._spills: dict[str, list[Spill]] = {name: [] for name in self.latents}
        self._open()

    def _open(self) -> None:
        _check_place(self.folder)
        _sweep(self.folder)
        with ExitStack() as stack, ExitStack() as lock:
            self._temp = stack.enter_context(atomic_folder(self.folder))
            lock.enter_context(folder_lock(self._temp))
            names = (TOKENS, DOCUMENTS, ROLE_BYTES, MASK, *map(slice_file, self.slices))
            self._files: dict[str, BinaryIO] = {
                name: stack.enter_context((self._temp / name).open("wb")) for name in names
            }
            self._stack, self._lock = stack.pop_all(), lock.pop_all()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def n_tokens(self) -> int:
        """Positions taken so far, masked ones included."""
        return self._n_contexts * self.context

    def add(
        self,
        tokens: np.ndarray,
        roles: np.ndarray,
        documents: np.ndarray,
        mask: np.ndarray,
        codes: Mapping[str, CodesLike],
        slices: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Take a batch of whole contexts. Codes at masked positions and explicit zeros are left out.

        Args:
            tokens: token ids [batch, context], any integers.
            roles: number of the role of each context [batch].
            documents: document id of each position [batch, context], below 2^31.
            mask: bool [batch, context], True where the position counts.
            codes: of each coder, by name; rows are the batch's positions in order.
            slices: of each slicing, by name, the number of the value of each position [batch, context].

        Raises:
            ConfigError: shapes, token ids, roles or coder names that do not fit. Nothing was taken then.
            NonFiniteError: a value that is NaN or infinite in float32.
        """
        if self._closed:
            raise ConfigError("this index writer is closed")
        check_batch(tokens, roles, documents, mask, self.context, self._vocab_size, self.roles)
        check_slices(slices or {}, self.slices, tokens.shape)
        check_coders(codes, self.latents)
        postings = {name: take_postings(name, codes[name], n, mask, self.n_tokens) for name, n in self.latents.items()}
        self._make_room(tokens.size)
        base = self.n_tokens - self._spill_base
        with disk_errors(self.folder):
            write_raw(self._files[TOKENS], tokens.astype(self._token_dtype))
            write_raw(self._files[DOCUMENTS], documents.astype(np.int32))
            write_raw(self._files[ROLE_BYTES], roles.astype(np.uint8))
            write_raw(self._files[MASK], np.packbits(mask, axis=1))
            for name in self.slices:
                write_raw(self._files[slice_file(name)], (slices or {})[name].astype(np.uint8))
        for name, new in postings.items():
            self._buffers[name].add(new.latents, (new.rows + base).astype(np.uint32), new.values)
        self._n_contexts += len(tokens)
        self._counted += np.bincount(roles, mask.sum(axis=1), len(self.roles)).astype(np.int64)
        if sum(buffer.count for buffer in self._buffers.values()) * BYTES_PER_POSTING >= self._budget:
            self._spill()

    def close(self) -> None:
        """Merge, write the manifest and put the folder in place. Does nothing the second time."""
        if self._closed:
            return
        try:
            if not self._n_contexts:
                raise DataError(f"{self.folder}: no contexts were added, so there is nothing to index")
            self._end_segment()
            with disk_errors(self.folder):
                for file in self._files.values():
                    file.close()
            self._merge()
            self._describe()
            self._stack.close()
            (self.folder / ".lock").unlink(missing_ok=True)
            self._lock.close()
        except BaseException:
            self.abort()
            raise
        self._closed = True

    def abort(self) -> None:
        """Throw away everything written; `folder` stays as it was before."""
        if self._closed:
            return
        self._closed = True
        self._stack.__exit__(_AbandonedError, _AbandonedError(), None)
        self._lock.close()

    def _make_room(self, positions: int) -> None:
        if positions > self._segment_tokens:
            raise ConfigError(f"a batch of {positions} positions does not fit a segment of {self._segment_tokens}")
        if self.n_tokens + positions - self._segment_base > self._segment_tokens:
            self._end_segment()

    def _end_segment(self) -> None:
        self._spill()
        self._segments.append(Segment(self._segment_base, self.n_tokens - self._segment_base))
        self._segment_base = self.n_tokens

    def _spill(self) -> None:
        for name, buffer in self._buffers.items():
            if buffer.count:
                spills = self._spills[name]
                folder = self._temp / ".spills" / self._folders[name] / str(len(spills))
                spills.append(buffer.spill(folder, self._spill_base, len(self._segments)))
        self._spill_base = self.n_tokens

    def _merge(self) -> None:
        shape = (self._n_contexts, self.context)
        table = TokenTable(
            open_raw(self._temp / TOKENS, self._token_dtype, shape).reshape(-1),
            open_raw(self._temp / ROLE_BYTES, np.uint8, shape[:1]), self.context, len(self.roles),
        )  # fmt: skip
        for name, n_latents in self.latents.items():
            folder = self._temp / self._folders[name]
            merge_coder(folder, self._spills[name], self._segments, n_latents, table)
            shutil.rmtree(self._temp / ".spills" / self._folders[name], ignore_errors=True)

    def _describe(self) -> None:
        shutil.rmtree(self._temp / ".spills", ignore_errors=True)
        if self._vocab is not None:
            write_json(self._temp / "vocab.json", self._vocab, indent=None)
        coders = {name: CoderEntry(self._folders[name], n) for name, n in self.latents.items()}
        IndexMeta(
            self.roles, self.context, self._n_contexts, self._token_dtype.name,
            tuple(int(n) for n in self._counted), coders, tuple(self._segments), self._meta, self.slices,
        ).write(self._temp)  # fmt: skip
        found = (f.relative_to(self._temp).as_posix() for f in self._temp.rglob("*") if f.is_file())
        write_manifest(self._temp, KIND, sorted(name for name in found if name != ".lock"))


class _AbandonedError(Exception):
    """Thrown through the writer's stack so that its folder is removed, never seen outside."""


def _check_place(folder: Path) -> None:
    """Refuse to replace a folder that holds something else than an index."""
    if folder.is_file():
        raise ConfigError(f"{folder}: is a file, expected a folder for the index")
    if folder.is_dir() and not (folder / "index.json").is_file() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty and holds no index; choose another folder")


def _sweep(folder: Path) -> None:
    """Remove what killed builds of this index left.

    A build that still runs holds its lock: `ResumeError` then.
    """
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        if (stale / TOKENS).is_file():
            with folder_lock(stale):
                shutil.rmtree(stale, ignore_errors=True)
