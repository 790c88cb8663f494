"""What every batch of one index has in common: coders, context, roles, slicings; and a batch checked against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from unmix.index.batch import IndexBatch
from unmix.index.checks import (
    Postings,
    check_batch,
    check_coders,
    check_roles,
    check_slices,
    check_slicings,
    coder_folders,
    take_postings,
)
from unmix.index.layout import DOCUMENTS, MASK, ROLE_BYTES, TOKENS, slice_file


@dataclass(frozen=True)
class Frame:
    """The sizes and names of one index. `ConfigError` where they cannot be used."""

    latents: Mapping[str, int]
    context: int
    roles: Sequence[str]
    slices: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    vocab_size: int | None = None
    """Number of token ids; up to 65536 of them are stored in 16 bits."""

    def __post_init__(self) -> None:
        check_roles(self.context, self.roles)
        check_slicings(self.slices)
        _ = self.folders

    @cached_property
    def folders(self) -> dict[str, str]:
        """Coder → its folder inside the index."""
        return coder_folders(self.latents, self.slices)

    @property
    def token_dtype(self) -> np.dtype[np.unsignedinteger]:
        """How token ids are stored."""
        small = self.vocab_size is not None and self.vocab_size <= 2**16
        return np.dtype(np.uint16 if small else np.uint32)

    @property
    def token_files(self) -> tuple[str, ...]:
        """The files with something for each position or context, coders apart."""
        return (TOKENS, DOCUMENTS, ROLE_BYTES, MASK, *map(slice_file, self.slices))

    def take(self, batch: IndexBatch, base: int) -> Taken:
        """A batch as it is stored. `base` is its first global position, for messages.

        Raises:
            ConfigError: shapes, token ids, roles or coder names that do not fit.
            NonFiniteError: a value that is NaN or infinite in float32.
        """
        check_batch(
            batch.tokens, batch.roles, batch.documents, batch.mask, self.context, self.vocab_size, self.roles
        )  # fmt: skip
        check_slices(batch.slices, self.slices, batch.tokens.shape)
        check_coders(batch.codes, self.latents)
        postings = {
            name: take_postings(name, batch.codes[name], n, batch.mask, base) for name, n in self.latents.items()
        }
        files = {
            TOKENS: batch.tokens.astype(self.token_dtype, copy=False),
            DOCUMENTS: batch.documents.astype(np.int32, copy=False),
            ROLE_BYTES: batch.roles.astype(np.uint8, copy=False),
            MASK: np.packbits(batch.mask, axis=1),
        }
        files |= {slice_file(name): batch.slices[name].astype(np.uint8, copy=False) for name in self.slices}
        return Taken(files, postings, self.context)


@dataclass(frozen=True)
class Taken:
    """A checked batch of whole contexts."""

    files: dict[str, np.ndarray]
    """By token file, what is to be appended; one row a context."""
    postings: dict[str, Postings]
    context: int

    def __len__(self) -> int:
        """Contexts."""
        return len(self.files[TOKENS])

    def rows(self, first: int, last: int) -> Taken:
        """Contexts [first, last) alone."""
        if (first, last) == (0, len(self)):
            return self
        files = {name: array[first:last] for name, array in self.files.items()}
        bounds = np.array([first, last]) * self.context
        postings: dict[str, Postings] = {}
        for name, whole in self.postings.items():
            cut = slice(*(int(i) for i in np.searchsorted(whole.rows, bounds)))
            postings[name] = Postings(whole.rows[cut] - bounds[0], whole.latents[cut], whole.values[cut])
        return Taken(files, postings, self.context)
