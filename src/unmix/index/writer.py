"""`IndexWriter`: streams encoded batches into an index folder that is whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from unmix.core.errors import ConfigError, DataError
from unmix.data.config import ROLES
from unmix.index.batch import IndexBatch
from unmix.index.checks import CodesLike, as_array, check_sizes, is_codes
from unmix.index.frame import Frame
from unmix.index.intake import Intake, runs_of
from unmix.index.layout import plain_meta, segment_folder
from unmix.index.merge import merge_runs
from unmix.index.plan import Cut, cut
from unmix.index.sealing import describe, new_index, seal

DEFAULT_BUDGET = 2 * 2**30
RUNS = ".runs"


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
        budget_bytes: memory for postings; when it is used up a sorted run is put on disk.
            One batch is always taken whole.
        segment_tokens: positions in one final segment, at most 2^32; default: at most 16 segments, see `plan.py`.

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
        segment_tokens: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._vocab = list(vocab) if vocab is not None else None
        if vocab_size is None and vocab is not None:
            vocab_size = len(vocab)
        # Sizes may come from NumPy, whose integers JSON does not take: it would say so after all the work.
        context = int(context)
        self._frame = Frame(
            {name: int(n) for name, n in latents.items()}, context, tuple(roles),
            {name: tuple(values) for name, values in (slices or {}).items()},
            None if vocab_size is None else int(vocab_size),
        )  # fmt: skip
        segment_tokens = None if segment_tokens is None else int(segment_tokens)
        check_sizes(context, budget_bytes, segment_tokens)
        self._meta = plain_meta(meta or {})
        self._budget, self._segment_tokens = budget_bytes, segment_tokens
        self._shard = cut(1, context, segment_tokens).shard
        with ExitStack() as stack:
            self._temp = stack.enter_context(new_index(self.folder))
            runs = self._temp / RUNS / "00000"
            self._intake = stack.enter_context(Intake(self._temp, self._frame, budget_bytes, runs))
            self._stack = stack.pop_all()
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
    def latents(self) -> dict[str, int]:
        """Number of latents of each coder."""
        return dict(self._frame.latents)

    @property
    def context(self) -> int:
        """Positions in a context."""
        return self._frame.context

    @property
    def n_tokens(self) -> int:
        """Positions taken so far, masked ones included."""
        return self._intake.contexts * self.context

    def add(
        self,
        tokens: Any,
        roles: np.ndarray | None = None,
        documents: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        codes: Mapping[str, CodesLike] | CodesLike | None = None,
        slices: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Take a batch of whole contexts. Codes at masked positions and explicit zeros are left out.

        Args:
            tokens: token ids [batch, context], any integers, array or tensor.
            roles: number of the role of each context [batch]; default: the first role.
            documents: document id of each position [batch, context], below 2^31; default: each context is one.
            mask: bool [batch, context], True where the position counts; default: everywhere.
            codes: of each coder, by name; rows are the batch's positions in order. One coder's need no name.
            slices: of each slicing, by name, the number of the value of each position [batch, context].

        Raises:
            ConfigError: shapes, token ids, roles or coder names that do not fit. Nothing was taken then.
            NonFiniteError: a value that is NaN or infinite in float32.
        """
        if self._closed:
            raise ConfigError("this index writer is closed")
        batch = self._batch(as_array(tokens), roles, documents, mask, codes, slices)
        taken = self._frame.take(batch, self.n_tokens)
        done, first = 0, self._intake.contexts
        try:
            while done < len(taken):
                n = min(len(taken) - done, self._shard - (first + done) % self._shard)
                self._intake.add(taken.rows(done, done + n), first + done)
                done += n
                if (first + done) % self._shard == 0:
                    self._end_shard()
        except BaseException:
            self.abort()  # a batch that is written in part can never be made good
            raise

    def _batch(
        self,
        tokens: np.ndarray,
        roles: np.ndarray | None,
        documents: np.ndarray | None,
        mask: np.ndarray | None,
        codes: Mapping[str, CodesLike] | CodesLike | None,
        slices: Mapping[str, np.ndarray] | None,
    ) -> IndexBatch:
        """What was given, and the defaults for the rest."""
        if codes is None:
            raise ConfigError("codes are missing: add(tokens, codes=…)")
        if is_codes(codes):
            codes = {name: cast("CodesLike", codes) for name in list(self._frame.latents)[:1]}
        if tokens.ndim != 2:
            raise ConfigError(f"tokens is {list(tokens.shape)}, expected [batch, {self.context}]")
        first = self._intake.contexts
        ids = np.arange(first, first + len(tokens))
        return IndexBatch(
            tokens,
            np.zeros(len(tokens), np.uint8) if roles is None else as_array(roles),
            np.repeat(ids[:, None], self.context, axis=1) if documents is None else as_array(documents),
            np.ones((len(tokens), self.context), bool) if mask is None else as_array(mask),
            cast("Mapping[str, CodesLike]", codes),
            {name: as_array(numbers) for name, numbers in (slices or {}).items()},
        )

    def close(self) -> None:
        """Merge, write the manifest and put the folder in place. Does nothing the second time."""
        if self._closed:
            return
        try:
            if not self._intake.contexts:
                raise DataError(f"{self.folder}: no contexts were added, so there is nothing to index")
            self._end_shard()
            self._intake.close()
            division = cut(self._intake.contexts, self.context, self._segment_tokens)
            self._merge(division)
            description = describe(
                self._temp, self._frame, division.n_contexts, division.segments, self._meta
            )  # fmt: skip
            seal(self._temp, description, self._vocab, self._budget)
            self._stack.close()
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

    def _end_shard(self) -> None:
        """The run folders are those of the shards, as far as the segments will need it."""
        done = self._intake.contexts
        self._intake.end_shard(done * self.context, self._temp / RUNS / f"{done // self._shard:05d}")

    def _merge(self, division: Cut) -> None:
        for name, n_latents in self.latents.items():
            home = self._frame.folders[name]
            for number, segment in enumerate(division.segments):
                runs = [
                    run
                    for shard in division.shards(number)
                    for run in runs_of(
                        self._temp / RUNS / f"{shard:05d}" / home, division.contexts(shard)[0] * self.context, n_latents
                    )
                ]
                merge_runs(self._temp / home / segment_folder(number), segment, runs, n_latents, self._budget)
                for run in runs:
                    shutil.rmtree(run.folder, ignore_errors=True)
        shutil.rmtree(self._temp / RUNS, ignore_errors=True)


class _AbandonedError(Exception):
    """Thrown through the writer's stack so that its folder is removed, never seen outside."""
