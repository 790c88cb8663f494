"""Codes: the sparse code of a batch in one CSR layout (decisions 2 and 3).

Rows are the flattened leading dimensions of the input. Inside a row entries are ordered by latent id; ties in
a top-k go to the lowest id; explicit zeros are kept where a kind always returns k entries; values may be
negative. Nothing here is dense except `dense()`, on request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """`rows` sparse vectors over `n_latents` latents."""

    indices: Int[Tensor, " nnz"]
    """int32 latent ids, ascending inside a row."""
    values: Float[Tensor, " nnz"]
    offsets: Int[Tensor, " rows_plus_1"]
    """int64; row r holds entries `offsets[r]` to `offsets[r + 1]`."""
    n_latents: int
    leading: tuple[int, ...]
    """Shape of the input without its last dimension; its product is `rows`."""
    uniform_k: int | None = None
    """The number of entries of every row, where it is constant."""
    context: dict[str, Tensor] = field(default_factory=lambda: {})
    """Per-token facts that `decode` needs back: `mean`, `std` [*leading, 1], `skip` [*leading, d_in]."""

    @classmethod
    def from_topk(
        cls,
        indices: Int[Tensor, "rows k"],
        values: Float[Tensor, "rows k"],
        n_latents: int,
        leading: tuple[int, ...] | None = None,
        context: dict[str, Tensor] | None = None,
    ) -> Codes:
        """Codes with exactly k entries a row; entries are put in order of latent id."""
        rows, k = indices.shape
        ordered, order = indices.sort(dim=-1)
        offsets = torch.arange(rows + 1, device=indices.device, dtype=torch.int64) * k
        return cls(
            ordered.reshape(-1).to(torch.int32), values.gather(-1, order).reshape(-1), offsets, n_latents,
            (rows,) if leading is None else leading, k, context or {},
        )  # fmt: skip

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "*leading latents"]) -> Codes:
        """Codes of the non-zero entries of a dense tensor."""
        flat = dense.reshape(-1, dense.shape[-1])
        mask = flat != 0
        rows, indices = mask.nonzero(as_tuple=True)
        return cls(
            indices.to(torch.int32), flat[rows, indices], offsets_of(mask.sum(-1)), flat.shape[-1],
            tuple(dense.shape[:-1]),
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return self.offsets.shape[0] - 1

    @property
    def nnz(self) -> int:
        """Number of stored entries, explicit zeros included."""
        return self.indices.shape[0]

    def token_rows(self) -> Int[Tensor, " nnz"]:
        """int64 row of every entry."""
        rows = torch.arange(self.rows, device=self.indices.device)
        if self.uniform_k is not None:
            return rows.repeat_interleave(self.uniform_k)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.nnz)

    def topk_view(self) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
        """`(indices, values)` as [rows, k] without a copy; `ValueError` where rows differ in length."""
        if self.uniform_k is None:
            raise ValueError("rows differ in length: these codes have no [tokens, k] view")
        shape = (self.rows, self.uniform_k)
        return self.indices.view(shape), self.values.view(shape)

    def row(self, i: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """`(indices, values)` of one token; `IndexError` where there is no such row."""
        i = range(self.rows)[i]
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        return self.indices[start:end], self.values[start:end]

    def l0(self) -> Int[Tensor, " rows"]:
        """int64 number of non-zero values of each token."""
        fired = (self.values != 0).to(torch.int64)
        return torch.zeros(self.rows, dtype=torch.int64, device=fired.device).index_add_(0, self.token_rows(), fired)

    def dense(self) -> Float[Tensor, "*leading latents"]:
        """The dense tensor `[*leading, n_latents]`. Costs rows × n_latents values; gradients flow."""
        flat = self.values.new_zeros(self.rows, self.n_latents)
        flat = flat.index_put((self.token_rows(), self.indices.long()), self.values)
        return flat.view(*self.leading, self.n_latents)

    def nonzero(self) -> Codes:
        """The same codes without explicit zeros."""
        return self.keep(self.values != 0)

    def keep(self, entries: Tensor) -> Codes:
        """Only the entries where the bool mask `entries [nnz]` is true."""
        if bool(entries.all()):
            return self
        lengths = torch.zeros(self.rows, dtype=torch.int64, device=entries.device).index_add_(
            0, self.token_rows(), entries.to(torch.int64)
        )
        return replace(
            self, indices=self.indices[entries], values=self.values[entries], offsets=offsets_of(lengths),
            uniform_k=None,
        )  # fmt: skip

    def select(self, rows: Tensor) -> Codes:
        """Codes of some rows: a bool mask over rows or a tensor of row ids. The result has one leading dimension.

        `ValueError` where a mask is not of `rows` entries, `IndexError` for an id that is no row.
        """
        if rows.dtype == torch.bool and rows.numel() != self.rows:
            raise ValueError(f"a mask of {rows.numel()} entries cannot select from {self.rows} rows")
        ids = rows.reshape(-1).nonzero().squeeze(-1) if rows.dtype == torch.bool else rows.reshape(-1).long()
        context = {k: v.reshape(self.rows, v.shape[-1])[ids] for k, v in self.context.items()}
        if self.uniform_k is not None:
            indices, values = self.topk_view()
            offsets = torch.arange(len(ids) + 1, device=ids.device, dtype=torch.int64) * self.uniform_k
            return replace(
                self, indices=indices[ids].reshape(-1), values=values[ids].reshape(-1), offsets=offsets,
                leading=(len(ids),), context=context,
            )  # fmt: skip
        lengths = self.offsets.diff()[ids]
        offsets = offsets_of(lengths)
        within = torch.arange(int(offsets[-1]), device=ids.device) - offsets[:-1].repeat_interleave(lengths)
        entries = self.offsets[:-1][ids].repeat_interleave(lengths) + within
        return replace(
            self, indices=self.indices[entries], values=self.values[entries], offsets=offsets,
            leading=(len(ids),), context=context,
        )  # fmt: skip

    def with_values(self, values: Tensor) -> Codes:
        """The same entries with other values."""
        return replace(self, values=values)

    def detach(self) -> Codes:
        """Codes cut from the autograd graph."""
        context = {k: v.detach() for k, v in self.context.items()}
        return replace(self, values=self.values.detach(), context=context)

    def to(self, device: torch.device | str) -> Codes:
        """Codes on another device."""
        context = {k: v.to(device) for k, v in self.context.items()}
        return replace(
            self, indices=self.indices.to(device), values=self.values.to(device),
            offsets=self.offsets.to(device), context=context,
        )  # fmt: skip

    def check(self) -> None:
        """Raise `ValueError` where the layout's promises do not hold (for tests and foreign codes)."""
        if math.prod(self.leading) != self.rows:
            raise ValueError(f"leading {self.leading} does not hold {self.rows} rows")
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != self.nnz:
            raise ValueError(
                f"offsets run from {int(self.offsets[0])} to {int(self.offsets[-1])}, expected 0 to {self.nnz}"
            )
        lengths = self.offsets.diff()
        if bool((lengths < 0).any()):
            raise ValueError("offsets fall")
        if self.uniform_k is not None and bool((lengths != self.uniform_k).any()):
            raise ValueError(f"a row does not hold uniform_k = {self.uniform_k} entries")
        if self.values.shape[0] != self.nnz:
            raise ValueError(f"{self.values.shape[0]} values for {self.nnz} latent ids")
        rows, ids = self.token_rows(), self.indices.long()
        keys = rows * self.n_latents + ids
        if self.nnz and (int(ids.min()) < 0 or int(ids.max()) >= self.n_latents):
            raise ValueError(f"a latent id lies outside 0 to {self.n_latents - 1}")
        if bool((keys.diff() <= 0).any()):
            raise ValueError("latent ids are not strictly ascending inside each row")


def offsets_of(lengths: Int[Tensor, " rows"]) -> Int[Tensor, " rows_plus_1"]:
    """int64 CSR offsets `[rows + 1]` from row lengths."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets
