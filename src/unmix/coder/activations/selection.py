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
        # topk breaks ties as it likes; only rows with a tie across the border are looked at again.
        ids = ids.clone()
        ids[tied] = _first_of_equals(gate[tied], best[tied, :k])
    return ids.sort(dim=-1).values


def _first_of_equals(gate: Tensor, best: Tensor) -> Tensor:
    """Ids `[rows, k]` of what lies above the least of `best [rows, k]` (NaN does), and the first of what equals it."""
    border = best[:, -1:]
    room = (best == border).sum(-1, keepdim=True)
    equal = gate == border
    keep = ~(gate <= border) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return (keep.reshape(-1).nonzero().squeeze(-1) % gate.shape[-1]).view(best.shape)


class TopKSelector:
    """k entries of each token."""

    def __init__(self, k: int, magnitude: bool = False, relu_first: bool = False) -> None:
        self.uniform_k: int | None = k
        self.magnitude, self.relu_first = magnitude, relu_first
        self._values: list[Tensor] = []

    def fresh(self) -> TopKSelector:
        """The same rule with nothing taken yet."""
        return TopKSelector(self.uniform_k or 0, self.magnitude, self.relu_first)

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
        return uniform_rows(kept, self._values, self.uniform_k or 0, like)


def uniform_rows(kept: list[Tensor], values: list[Tensor], k: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR arrays of tiles of `[t, k]` latent ids and their flat values."""
    rows = sum(ids.shape[0] for ids in kept)
    offsets = torch.arange(rows + 1, device=like.device, dtype=torch.int64) * k
    if not kept:
        return torch.zeros(0, dtype=torch.int32, device=like.device), offsets, like.new_zeros(0)
    return torch.cat([ids.reshape(-1) for ids in kept]).to(torch.int32), offsets, torch.cat(values)


class ThresholdSelector:
    """Every entry whose gate (or, with `on_scores`, score) lies above a floor: one number, or one a latent."""

    def __init__(self, floor: float | Tensor, on_scores: bool = False) -> None:
        self.uniform_k: int | None = None
        self.floor, self.on_scores = floor, on_scores
        self._values: list[Tensor] = []
        self._lengths: list[Tensor] = []

    def fresh(self) -> ThresholdSelector:
        """The same rule with nothing taken yet."""
        return ThresholdSelector(self.floor, self.on_scores)

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Keep entries above the floor."""
        rows, n = gate.shape
        kept = ((scores if self.on_scores else gate) > self.floor).reshape(-1).nonzero().squeeze(-1)
        edges = torch.arange(rows + 1, device=gate.device) * n
        self._lengths.append(torch.searchsorted(kept, edges).diff())
        self._values.append(scores.reshape(-1)[kept])
        return kept % n

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate the tiles."""
        if not kept:
            empty = torch.zeros(0, dtype=torch.int32, device=like.device)
            return empty, torch.zeros(1, dtype=torch.int64, device=like.device), like.new_zeros(0)
        return torch.cat(kept).to(torch.int32), offsets_of(torch.cat(self._lengths)), torch.cat(self._values)


class ThresholdOrMaxSelector(ThresholdSelector):
    """Every entry whose gate lies above a floor; of a token with none, the largest entry where it is positive."""

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Keep entries above the floor, or the row's best."""
        best = gate.argmax(-1, keepdim=True)
        empty = ~(gate > self.floor).any(-1, keepdim=True) & (gate.gather(-1, best) > 0)
        # The base class compares with its floor: lift the lone maxima above any.
        lifted = gate.scatter(-1, best, torch.where(empty, torch.inf, gate.gather(-1, best)))
        return super().tile(scores, lifted)


class GatedSelector(ThresholdSelector):
    """Entries whose gate is above zero, and whose magnitude `factor · score + bias` is too."""

    def __init__(self, factor: Tensor, bias: Tensor) -> None:
        super().__init__(0.0)
        self.factor, self.bias = factor, bias

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Keep where both are positive."""
        return super().tile(scores, torch.minimum(gate, scores * self.factor + self.bias))


class GroupMaxSelector:
    """The best entry of each of k contiguous groups; among equals, and below zero, the lowest id."""

    def __init__(self, k: int) -> None:
        self.uniform_k: int | None = k
        self._values: list[Tensor] = []

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """One latent of each group."""
        k = self.uniform_k or 0
        width = gate.shape[-1] // k
        ids = gate.unflatten(-1, (k, width)).relu().argmax(-1) + torch.arange(k, device=gate.device) * width
        self._values.append(scores.gather(-1, ids).reshape(-1))
        return ids

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate the tiles."""
        return uniform_rows(kept, self._values, self.uniform_k or 0, like)


class BatchTopKSelector:
    """The `k · rows` largest positive entries of the whole batch, however tiles cut it.

    A running candidate set of at most k·rows entries is merged with each tile, so memory stays at the candidates
    plus one tile. Among equals the first in (token, latent) order wins.
    """

    def __init__(self, k: int, rows: int) -> None:
        self.uniform_k: int | None = None
        self.budget = k * rows
        self._floor = 0.0
        self._gates: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._row = self._n = 0

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """Merge the positive entries of this tile into the candidates."""
        rows, self._n = gate.shape
        flat = gate.reshape(-1)
        where = self._worth_a_look(flat)
        self._gates.append(flat[where])
        self._keys.append(where + self._row * self._n)
        self._scores.append(scores.reshape(-1)[where])
        self._row += rows
        if sum(len(part) for part in self._gates) > self.budget:
            self._cut()
        return where

    def _worth_a_look(self, flat: Tensor) -> Tensor:
        """Places in `flat` that may belong to the best: above the worst candidate once there are enough of them.

        In a first large tile, above a guess that a few more than enough exceed: listing all the positive places, half
        of the tile, costs five times as much.
        """
        if self._floor == 0.0:
            guess = _likely_border(flat, self.budget)
            where = (flat > guess).nonzero().squeeze(-1)
            if guess == 0.0 or len(where) >= self.budget:
                return where
        return (flat > self._floor).nonzero().squeeze(-1)

    def _cut(self) -> None:
        """Keep the best `budget` candidates, still in (token, latent) order."""
        gates = torch.cat(self._gates)
        border = gates.kthvalue(len(gates) - self.budget + 1).values
        above, equal = gates > border, gates == border
        keep = above | (equal & (equal.cumsum(0) <= self.budget - above.sum()))
        self._gates = [gates[keep]]
        self._keys = [torch.cat(self._keys)[keep]]
        self._scores = [torch.cat(self._scores)[keep]]
        self._floor = float(border)

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The surviving candidates in CSR order."""
        if not kept:
            return ThresholdSelector(0.0).finish([], like)
        keys = torch.cat(self._keys)
        lengths = torch.bincount(keys // self._n, minlength=self._row)
        return (keys % self._n).to(torch.int32), offsets_of(lengths), torch.cat(self._scores)


def _likely_border(flat: Tensor, n: int) -> float:
    """A number that a few more than the `n` largest entries of `flat` should exceed, from a sample; at least 0."""
    stride = flat.numel() // 2**16 | 1
    sample = flat[::stride]
    rank = n * 5 // (4 * stride) + 8
    if rank >= len(sample):
        return 0.0
    return max(0.0, float(sample.kthvalue(len(sample) - rank).values))


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
