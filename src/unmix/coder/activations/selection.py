"""Selectors: which (token, latent) pairs of a scored tile are kept. No gradients live here."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.codes import offsets_of


class Selector(Protocol):
    """Sees tiles of scores in token order, then hands out the kept pairs in CSR order."""

    uniform_k: int | None

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Take `scores [t, F]` (pre-activations) and `gate [t, F]` (where the selection acts)."""
        ...

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(indices int32 [nnz], offsets int64 [rows + 1], pre-activations [nnz])`."""
        ...


def top_lowest(gate: Float[Tensor, "t F"], k: int) -> Int[Tensor, "t k"]:
    """Ids of the k largest entries of each row, ascending; among equals the lowest ids win (decision 2)."""
    n = gate.shape[-1]
    if k >= n:
        return torch.arange(n, device=gate.device).expand(gate.shape[0], n)
    best, ids = gate.topk(k + 1, dim=-1, sorted=True)
    ids = ids[:, :k]
    tied = best[:, k - 1] == best[:, k]
    if bool(tied.any()):
        # topk breaks ties as it likes; only rows with a tie across the border need the stable sort.
        stable = gate[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
        ids = ids.clone()
        ids[tied] = stable
    return ids.sort(dim=-1).values


class TopKSelector:
    """k entries of each token."""

    def __init__(self, k: int, magnitude: bool = False, relu_first: bool = False) -> None:
        self.uniform_k: int | None = k
        self.magnitude, self.relu_first = magnitude, relu_first
        self._values: list[Tensor] = []

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Keep the k best of each row of `gate`; remember their scores."""
        if self.magnitude:
            gate = gate.abs()
        elif self.relu_first:
            gate = gate.relu()
        ids = top_lowest(gate, self.uniform_k or 0)
        self._values.append(scores.gather(-1, ids).reshape(-1))
        return ids

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate the tiles."""
        k = self.uniform_k or 0
        rows = sum(ids.shape[0] for ids in kept)
        offsets = torch.arange(rows + 1, device=like.device, dtype=torch.int64) * k
        if not kept:
            return torch.zeros(0, dtype=torch.int32, device=like.device), offsets, like.new_zeros(0)
        return torch.cat([ids.reshape(-1) for ids in kept]).to(torch.int32), offsets, torch.cat(self._values)


class ThresholdSelector:
    """Every entry whose gate (or, with `on_scores`, score) lies above a floor: one number, or one a latent."""

    def __init__(self, floor: float | Tensor, on_scores: bool = False) -> None:
        self.uniform_k: int | None = None
        self.floor, self.on_scores = floor, on_scores
        self._values: list[Tensor] = []
        self._lengths: list[Tensor] = []

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Keep entries above the floor."""
        mask = (scores if self.on_scores else gate) > self.floor
        ids = mask.nonzero()[:, 1]
        self._lengths.append(mask.sum(-1))
        self._values.append(scores[mask])
        return ids

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate the tiles."""
        if not kept:
            empty = torch.zeros(0, dtype=torch.int32, device=like.device)
            return empty, torch.zeros(1, dtype=torch.int64, device=like.device), like.new_zeros(0)
        return torch.cat(kept).to(torch.int32), offsets_of(torch.cat(self._lengths)), torch.cat(self._values)


class BatchTopKSelector:
    """The `k · rows` largest positive entries of the whole batch, however tiles cut it.

    A running candidate set of at most k·rows entries is merged with each tile, so memory stays at the candidates
    plus one tile. Among equals the first in (token, latent) order wins.
    """

    def __init__(self, k: int, rows: int) -> None:
        self.uniform_k: int | None = None
        self.budget = k * rows
        self._gate: Tensor | None = None
        self._key: Tensor | None = None
        self._score: Tensor | None = None
        self._row = 0

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Merge the positive entries of this tile into the candidates."""
        n = gate.shape[-1]
        flat = gate.reshape(-1)
        where = (flat > 0).nonzero().squeeze(-1)
        key = where + self._row * n
        gates, values = flat[where], scores.reshape(-1)[where]
        if self._gate is not None and self._key is not None and self._score is not None:
            gates = torch.cat([self._gate, gates])
            key = torch.cat([self._key, key])
            values = torch.cat([self._score, values])
        if gates.shape[0] > self.budget:
            order = gates.sort(descending=True, stable=True).indices[: self.budget].sort().values
            gates, key, values = gates[order], key[order], values[order]
        self._gate, self._key, self._score = gates, key, values
        self._row += gate.shape[0]
        return gate.new_zeros(0).new_tensor([n])

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The surviving candidates in CSR order."""
        if self._gate is None or self._key is None or self._score is None:
            return ThresholdSelector(0.0).finish([], like)
        n = int(kept[0][0])
        rows = self._key // n
        lengths = torch.bincount(rows, minlength=self._row)
        return (self._key % n).to(torch.int32), offsets_of(lengths), self._score


class AllSelector:
    """Every latent of every token: for identity coders only."""

    def __init__(self, n_latents: int) -> None:
        self.uniform_k: int | None = n_latents
        self._values: list[Tensor] = []

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Keep the whole row."""
        self._values.append(scores.reshape(-1).clone())
        return torch.arange(scores.shape[-1], device=scores.device).repeat(scores.shape[0])

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate the tiles."""
        n = self.uniform_k or 0
        if not kept:
            return TopKSelector(n).finish([], like)
        indices = torch.cat(kept).to(torch.int32)
        offsets = torch.arange(indices.shape[0] // n + 1, device=like.device, dtype=torch.int64) * n
        return indices, offsets, torch.cat(self._values)
