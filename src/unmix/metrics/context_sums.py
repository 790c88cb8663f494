"""Sums kept per context, in float64: the one store behind every metric that is a ratio of sums.

A context (one sequence) is the unit that is resampled for confidence intervals, because tokens of one
sequence are not independent. Totals are added in the order of context ids, so they do not depend on how the
contexts were batched or in which order parts were merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.core.errors import ConfigError, NonFiniteError


class ContextSums:
    """A growing table: one row a context id, one float64 column a named sum. Costs 8 bytes a cell."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._row: dict[int, int] = {}
        self._cells = torch.zeros(0, len(self.columns), dtype=torch.float64)

    def add(self, contexts: Int[Tensor, " tokens"], values: Tensor) -> None:
        """Add `values` [tokens, columns] to the rows of their contexts."""
        if len(contexts) == 0:
            return
        ids, inverse = contexts.unique(return_inverse=True)
        sums = torch.zeros(len(ids), len(self.columns), dtype=torch.float64, device=values.device)
        sums.index_add_(0, inverse.to(values.device), values.to(torch.float64))
        self._add_rows([int(i) for i in ids.tolist()], sums.cpu())

    def merge(self, other: ContextSums) -> None:
        """Add the sums of `other`, which must have the same columns."""
        if self.columns != other.columns:
            raise ConfigError(f"cannot merge sums of {list(other.columns)} into {list(self.columns)}")
        self._add_rows(list(other._row), other._cells[: len(other._row)])

    def _add_rows(self, ids: list[int], sums: Tensor) -> None:
        new = [i for i in ids if i not in self._row]
        for i in new:
            self._row[i] = len(self._row)
        if len(self._row) > len(self._cells):
            grown = torch.zeros(max(2 * len(self._cells), len(self._row)), len(self.columns), dtype=torch.float64)
            grown[: len(self._cells)] = self._cells
            self._cells = grown
        self._cells.index_add_(0, torch.tensor([self._row[i] for i in ids]), sums)

    @property
    def n_contexts(self) -> int:
        """Number of contexts seen."""
        return len(self._row)

    @property
    def ids(self) -> list[int]:
        """Context ids, ascending."""
        return sorted(self._row)

    def table(self) -> Float[Tensor, "contexts columns"]:
        """The sums in the order of `ids`, float64."""
        return self._cells[torch.tensor([self._row[i] for i in self.ids], dtype=torch.int64)]

    def totals(self) -> Float[Tensor, " columns"]:
        """The sums over all contexts, float64."""
        return self.table().sum(0)


def one_context(rows: int, contexts: Tensor | None) -> Tensor:
    """`contexts`, or id 0 for every row where none were given (no interval can then be formed)."""
    return torch.zeros(rows, dtype=torch.int64) if contexts is None else contexts


def double(x: Tensor) -> Tensor:
    """`x` detached and in float64, on the CPU where its device has no float64 (Apple's)."""
    x = x.detach()
    return x.cpu().to(torch.float64) if x.device.type == "mps" else x.to(torch.float64)


def require_finite(x: Tensor, metric: str, name: str, contexts: Tensor) -> None:
    """Raise `NonFiniteError` naming the metric, the argument, the first bad row and its context."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    first = bad[0].tolist()
    place = f"row {first[0]}" + (f", column {first[1]}" if len(first) > 1 else "")
    raise NonFiniteError(
        f"{metric}: {len(bad)} non-finite values in {name}, first {float(x[tuple(first)])} at {place} "
        f"(context {int(contexts[first[0]])})"
    )
