"""(latent, token) pairs sorted by latent, cut into pieces of bounded length, without a look by the host.

A latent's pairs are one piece, or several where it fires on more tokens than `PIECE`: those pieces leave partial sums
in `slots`, which a second kernel adds up in their order. No sum depends on which program ran first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from unmix.coder.codes import offsets_of

PIECE = 128
"""Pairs that one program takes at most."""


@dataclass(frozen=True)
class Pairs:
    """Pairs by latent, and the programs that will take them."""

    order: Int[Tensor, " nnz"]
    """int32 or int64 place of each pair among the codes' entries, latent by latent, tokens ascending."""
    tokens: Int[Tensor, " nnz"]
    """int32 token of each."""
    pieces: Int[Tensor, "pieces 4"]
    """int64: latent (the number of latents: nothing to do), first pair, end, slot (−1: the whole latent is here)."""
    split: Int[Tensor, "latents 3"]
    """int64: latent (−1: none), its first slot, how many; one row for every latent that could be split."""
    slots: int
    """Room for partial sums."""


def by_latent(
    indices: Int[Tensor, " nnz"], offsets: Int[Tensor, " rows_plus_1"], n_latents: int, piece: int = PIECE
) -> Pairs:
    """Sort once. Sizes are upper bounds known to the host: `n_latents + nnz // piece` pieces, `nnz // piece` splits."""
    nnz, device = indices.shape[0], indices.device
    keys, order = torch.sort(indices, stable=True)
    rows = torch.arange(offsets.shape[0] - 1, device=device, dtype=torch.int32)
    tokens = rows.repeat_interleave(offsets.diff(), output_size=nnz)[order]
    # Edges by search: torch's bincount adds by atomics on a card.
    latents = torch.arange(n_latents + 1, device=device, dtype=keys.dtype)
    edges = torch.searchsorted(keys, latents)
    lengths = edges.diff()
    count = lengths.add(piece - 1).div(piece, rounding_mode="floor").clamp_min(1)
    ends = offsets_of(count)
    numbers = torch.arange(n_latents + nnz // piece, device=device)
    latent = torch.searchsorted(ends[1:], numbers, right=True)
    at = latent.clamp_max(n_latents - 1)
    within = numbers - ends[at]
    first = edges[at] + within * piece
    end = torch.minimum(first + piece, edges[at + 1])
    several = count > 1
    slot = offsets_of(torch.where(several, count, 0))
    pieces = torch.stack([latent, first, end, torch.where(several[at], slot[at] + within, -1)], 1)
    return Pairs(
        order.to(torch.int32) if nnz < 2**31 else order, tokens, pieces, _split(several, slot, count, nnz // piece),
        2 * (nnz // piece),
    )  # fmt: skip


def _split(several: Tensor, slot: Tensor, count: Tensor, most: int) -> Tensor:
    """Which latents were cut, in order: `[most, 3]`, the rest of the rows −1."""
    table = torch.full((most + 1, 3), -1, dtype=torch.int64, device=several.device)
    # Latents that were not cut all write to a last row that is thrown away.
    place = torch.where(several, several.cumsum(0) - 1, most)
    numbers = torch.arange(len(several), device=several.device)
    table[place] = torch.stack([numbers, slot[:-1], count], 1)
    return table[:most]
