"""`build_index`: from encoded batches to an open index; `verify` and `stats` of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmix.core.manifest import Problem, read_manifest, verify_folder
from unmix.core.progress import task
from unmix.data.config import ROLES
from unmix.index.batch import IndexBatch as IndexBatch
from unmix.index.layout import KIND
from unmix.index.reader import LatentIndex, open_index
from unmix.index.writer import DEFAULT_BUDGET, IndexWriter


def build_index(
    folder: str | Path,
    batches: Iterable[IndexBatch],
    coders: Mapping[str, int],
    context: int,
    *,
    meta: Mapping[str, Any] | None = None,
    vocab: Sequence[str] | None = None,
    vocab_size: int | None = None,
    roles: Sequence[str] = ROLES,
    slices: Mapping[str, Sequence[str]] | None = None,
    total_tokens: int = 0,
    budget_bytes: int = DEFAULT_BUDGET,
) -> LatentIndex:
    """Write an index of every batch and open it. Arguments and errors as `IndexWriter`.

    `coders` gives the number of latents of each coder; `total_tokens` only scales the progress shown.
    """
    writer = IndexWriter(
        folder, coders, context, meta, vocab=vocab, vocab_size=vocab_size, roles=roles, slices=slices,
        budget_bytes=budget_bytes,
    )  # fmt: skip
    with writer, task("index", total_tokens) as progress:
        for batch in batches:
            writer.add(batch.tokens, batch.roles, batch.documents, batch.mask, batch.codes, batch.slices)
            progress.advance(batch.tokens.size)
    return open_index(folder)


def verify(folder: str | Path) -> list[Problem]:
    """Hash every file of an index folder; the broken ones, named. `CorruptError` where it is no index."""
    read_manifest(folder, KIND)
    return verify_folder(folder)


def stats(index: LatentIndex | str | Path) -> dict[str, Any]:
    """The summary of an index, open or by folder, as plain numbers."""
    return (index if isinstance(index, LatentIndex) else open_index(index)).stats
