"""Selection over all shards: each proposes, the gates of what is proposed are exchanged, all decide alike.

Exact, ties included: the latents kept are those that one process would keep from the same pre-activations.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmix.coder.activations.selection import BatchTopKSelector, Selector, TopKSelector, top_lowest
from unmix.coder.codes import offsets_of
from unmix.train.parallel.mesh import Mesh

DIGIT = 16
"""Bits of a gate that one round of the count over ranks settles."""


def best_of_all(gate: Float[Tensor, "rows mine"], k: int, columns: int, mesh: Mesh) -> Bool[Tensor, "rows mine"]:
    """Which of this shard's candidates are among the k best of each row over all shards.

    Candidates stand in the order of their latents, at most `columns` a shard. Latents need not be exchanged: shards
    hold ascending latents, so the place in the gathered row breaks ties as the latent's number does.
    """
    mine = gate.shape[1]
    padded = gate.new_full((gate.shape[0], columns), -torch.inf)
    padded[:, :mine] = gate
    everyone = torch.cat(mesh.gather(padded, "dictionary"), dim=1)
    chosen = torch.zeros_like(everyone, dtype=torch.bool).scatter(-1, top_lowest(everyone, k), True)
    start = mesh.dictionary_index * columns
    return chosen[:, start : start + mine]


def best_of_batch(gate: Float[Tensor, " n"], keys: Int[Tensor, " n"], budget: int, mesh: Mesh) -> Bool[Tensor, " n"]:
    """Which of this rank's positive gates are among the `budget` largest of all ranks; among equals the least key wins.

    The border is found by counting digits of the numbers' bits, so that messages have one size whatever `n` is.
    """
    total = mesh.sum_(torch.tensor([len(gate)], device=gate.device), "all")
    if int(total) <= budget:
        return torch.ones_like(gate, dtype=torch.bool)
    border, room = _border(gate, budget, mesh)
    equal = gate == border
    ties = mesh.gather(equal.sum().view(1), "all")
    if sum(int(count) for count in ties) > room:
        widest = max(int(count) for count in ties)
        mine = torch.full((widest,), torch.iinfo(torch.int64).max, device=gate.device)
        mine[: int(equal.sum())] = keys[equal]
        last = torch.cat(mesh.gather(mine, "all")).sort().values[room - 1]
        equal = equal & (keys <= last)
    return (gate > border) | equal


def _border(gate: Tensor, budget: int, mesh: Mesh) -> tuple[Tensor, int]:
    """The `budget`-th largest of all ranks' positive gates, and how many equal to it are among the best."""
    whole = torch.int64 if gate.dtype == torch.float64 else torch.int32
    bits = gate.contiguous().view(whole).long()  # positive floats are ordered as their bits are
    prefix, room = 0, budget
    for shift in range(torch.iinfo(whole).bits - DIGIT, -1, -DIGIT):
        digits = (bits[bits >> (shift + DIGIT) == prefix] >> shift) & (2**DIGIT - 1)
        counts = mesh.sum_(torch.bincount(digits, minlength=2**DIGIT), "all").flip(0)
        reached = counts.cumsum(0)
        place = int(torch.searchsorted(reached, room))
        room -= int(reached[place] - counts[place])
        prefix = prefix << DIGIT | (2**DIGIT - 1 - place)
    return torch.tensor(prefix, dtype=whole, device=gate.device).view(gate.dtype), room


class SharedTopK:
    """k entries of each token over all shards."""

    uniform_k: int | None = None

    def __init__(self, inner: TopKSelector, k: int, columns: int, scale: Tensor | None, mesh: Mesh) -> None:
        """`inner` proposes, at most `columns` entries a token; `scale` is the gate's factor of each latent."""
        self.inner, self.k, self.columns, self.scale, self.mesh = inner, k, columns, scale, mesh

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """This shard's candidates."""
        return self.inner.tile(scores, gate)

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates that are among the best of all shards."""
        indices, offsets, values = self.inner.finish(kept, like)
        gate = values if self.scale is None else values * self.scale[indices.long()]
        if self.inner.magnitude:
            gate = gate.abs()
        elif self.inner.relu_first:
            gate = gate.relu()
        rows = len(offsets) - 1
        chosen = best_of_all(gate.view(rows, -1), self.k, self.columns, self.mesh)
        flat = chosen.reshape(-1)
        return indices[flat], offsets_of(chosen.sum(-1)), values[flat]


class SharedBatchTopK:
    """`k · rows` entries of the whole batch, over all slices of it and all shards."""

    uniform_k: int | None = None

    def __init__(self, inner: BatchTopKSelector, n_latents: int, scale: Tensor | None, mesh: Mesh) -> None:
        """`inner` has the budget of the whole batch; `n_latents` are those of the whole coder."""
        self.inner, self.n_latents, self.scale, self.mesh = inner, n_latents, scale, mesh

    def tile(self, scores: Tensor, gate: Tensor) -> Tensor:
        """This rank's candidates."""
        return self.inner.tile(scores, gate)

    def finish(self, kept: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates that are among the best of the batch."""
        indices, offsets, values = self.inner.finish(kept, like)
        mesh, rows = self.mesh, len(offsets) - 1
        gate = values if self.scale is None else values * self.scale[indices.long()]
        token = torch.arange(rows, device=values.device).repeat_interleave(offsets.diff(), output_size=len(indices))
        first = mesh.dictionary_index * (self.n_latents // mesh.dictionary)
        keys = (token + mesh.data_index * rows) * self.n_latents + first + indices
        chosen = best_of_batch(gate, keys, self.inner.budget, mesh)
        lengths = torch.bincount(token[chosen], minlength=rows)
        return indices[chosen], offsets_of(lengths), values[chosen]


def shared_selector(local: Selector, n_latents: int, scale: Tensor | None, mesh: Mesh) -> Selector:
    """The selector over all ranks behind a local one; thresholds need no exchange. `n_latents`: the whole coder's."""
    if isinstance(local, TopKSelector) and mesh.dictionary > 1:
        k = local.uniform_k or 0
        return SharedTopK(local, k, k, scale, mesh)
    if isinstance(local, BatchTopKSelector) and mesh.size > 1:
        return SharedBatchTopK(local, n_latents, scale, mesh)
    return local
