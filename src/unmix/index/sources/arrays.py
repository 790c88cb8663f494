"""A source over arrays in memory: codes that user code made, or a small index to try something on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unmix.core.errors import ConfigError
from unmix.data.config import ROLES
from unmix.index.batch import IndexBatch
from unmix.index.checks import CodesLike


@dataclass(frozen=True)
class ArrayCodes:
    """Codes in CSR layout: row i has entries `offsets[i]` to `offsets[i + 1]`."""

    indices: np.ndarray
    """Latent of each entry."""
    values: np.ndarray
    offsets: np.ndarray
    """[rows + 1]."""
    n_latents: int

    def rows(self, first: int, last: int) -> ArrayCodes:
        """Rows [first, last)."""
        cut = slice(int(self.offsets[first]), int(self.offsets[last]))
        offsets = self.offsets[first : last + 1] - self.offsets[first]
        return ArrayCodes(self.indices[cut], self.values[cut], offsets, self.n_latents)


@dataclass(frozen=True)
class ArraySource:
    """Contexts and codes in memory; where workers shall reopen it, it must pickle, which arrays do."""

    tokens: np.ndarray
    """Token ids [n_contexts, context]."""
    codes: Mapping[str, CodesLike]
    """By coder; rows are the positions of all contexts in order."""
    role_numbers: np.ndarray | None = None
    """[n_contexts]; default: all of the first role."""
    documents: np.ndarray | None = None
    """Document of each position [n_contexts, context]; default: each context is one."""
    mask: np.ndarray | None = None
    """[n_contexts, context], True where a position counts; default: everywhere."""
    slice_numbers: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """By slicing [n_contexts, context]."""
    slice_values: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    roles: tuple[str, ...] = ROLES
    vocab: list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    batch: int = 8
    """Contexts in a batch."""

    def __post_init__(self) -> None:
        """`ConfigError` where the arrays do not fit each other."""
        if self.tokens.ndim != 2:
            raise ConfigError(f"tokens are {list(self.tokens.shape)}, expected [n_contexts, context]")
        for name, codes in self.codes.items():
            if len(codes.offsets) != self.tokens.size + 1:
                raise ConfigError(
                    f"codes of {name!r} have {len(codes.offsets) - 1} rows, the tokens {self.tokens.size} positions"
                )

    @property
    def latents(self) -> dict[str, int]:
        """Number of latents of each coder."""
        return {name: int(codes.n_latents) for name, codes in self.codes.items()}

    @property
    def context(self) -> int:
        """Positions in a context."""
        return self.tokens.shape[1]

    @property
    def n_contexts(self) -> int:
        """All contexts."""
        return len(self.tokens)

    @property
    def vocab_size(self) -> int | None:
        """Number of display strings."""
        return None if self.vocab is None else len(self.vocab)

    @property
    def slices(self) -> dict[str, tuple[str, ...]]:
        """Slicings."""
        return {name: tuple(values) for name, values in self.slice_values.items()}

    @property
    def inputs(self) -> dict[str, Any]:
        """Hashes of every array."""
        plain = {name: _csr(codes) for name, codes in self.codes.items()}
        optional = (self.role_numbers, self.documents, self.mask)
        return {
            "tokens": _digest(self.tokens),
            "positions": _digest(*(array for array in optional if array is not None)),
            "slices": {name: _digest(array) for name, array in sorted(self.slice_numbers.items())},
            "coders": {name: _digest(c.indices, c.values, c.offsets) for name, c in sorted(plain.items())},
        }

    def batches(self, first: int, last: int) -> Iterator[IndexBatch]:
        """Contexts [first, last)."""
        plain = {name: _csr(codes) for name, codes in self.codes.items()}
        for start in range(first, last, self.batch):
            cut = slice(start, min(start + self.batch, last))
            shape = self.tokens[cut].shape
            rows = (start * self.context, cut.stop * self.context)
            ids = np.arange(start, cut.stop)
            yield IndexBatch(
                tokens=self.tokens[cut],
                roles=np.zeros(shape[0], np.uint8) if self.role_numbers is None else self.role_numbers[cut],
                documents=np.repeat(ids[:, None], shape[1], 1) if self.documents is None else self.documents[cut],
                mask=np.ones(shape, bool) if self.mask is None else self.mask[cut],
                codes={name: codes.rows(*rows) for name, codes in plain.items()},
                slices={name: numbers[cut] for name, numbers in self.slice_numbers.items()},
            )


def _csr(codes: CodesLike) -> ArrayCodes:
    return ArrayCodes(
        np.asarray(codes.indices), np.asarray(codes.values), np.asarray(codes.offsets), int(codes.n_latents)
    )


def _digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{list(array.shape)}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()[:16]
