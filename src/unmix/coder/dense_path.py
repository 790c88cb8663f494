"""Decode and gradients by plain products on dense tiles of codes: cheaper than gathers once much of the codes fires.

Penalties start from codes in which half of the latents are above zero. The sparse path then reads a row of weights for
nearly every cell, and sorts as many pairs by latent; a product of the whole tile costs the same whatever fires.
Tiles hold some tokens' codes at a time, so `[tokens, latents]` is never whole. Numbers are those of the sparse path up
to their rounding, where weights and gradients are finite (a product meets the zeros too).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

TILE_BYTES = 32 * 2**20
"""Size of the dense tile."""
LEAST_ROWS = 16
"""Rows of the smallest tile: products of fewer run at half the speed."""
LEAST_CELLS = 2**16
"""Tokens × latents below which nothing is to be gained."""
FORWARD = 0.25
"""Share of the cells that are filled above which the decoder's product wins.

Milliseconds sparse / dense, one thread, 2,048 tokens: d 576, F 2304: 24 / 59 at 0.12, 102 / 67 at 0.5; d 512, F 8192:
126 / 213 and 528 / 227; d 128, F 2048, 4,096 tokens: 7 / 35 and 30 / 47.
"""
BACKWARD = 0.12
"""The same for gradients, whose sparse form sorts the pairs.

Of the decoder (values and weights), at 0.05, 0.12 and 0.5: 41 / 117, 94 / 113, 417 / 129; 146 / 415, 363 / 400,
2,130 / 455; 43 / 64, 109 / 62, 490 / 78. Of the encoder's weights at 0.12: 43 / 59, 149 / 199, 40 / 35.
"""


def pays(indices: Tensor, offsets: Tensor, table: Tensor, crossing: float) -> bool:
    """Whether codes over the rows of `table [latents, d]` fill more than a share `crossing` of the cells."""
    cells = (offsets.shape[0] - 1) * table.shape[0]
    return (
        cells >= LEAST_CELLS
        and indices.shape[0] > crossing * cells
        and table.dtype in (torch.float32, torch.float64)  # sums of parts would lose what narrower ones cannot hold
    )


def decode(
    values: Float[Tensor, " nnz"],
    W_dec: Float[Tensor, "latents d_out"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
) -> Float[Tensor, "rows d_out"]:
    """`out[row] = Σ values_j · W_dec[latent_j]`."""
    out = values.new_empty(offsets.shape[0] - 1, W_dec.shape[1])
    for rows, entries, cells, tile in _tiles(indices, offsets, W_dec):
        _fill(tile, cells, values[entries])
        torch.mm(tile, W_dec, out=out[rows])
    return out


def dots(
    left: Float[Tensor, "rows d"],
    table: Float[Tensor, "latents d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
) -> Float[Tensor, " nnz"]:
    """`<left[row_j], table[latent_j]>` for every pair."""
    out = left.new_empty(indices.shape[0])
    for rows, entries, cells, tile in _tiles(indices, offsets, table):
        torch.mm(left[rows], table.T, out=tile)
        torch.index_select(tile.view(-1), 0, cells, out=out[entries])
    return out


def decode_gradients(
    grad_out: Float[Tensor, "rows d_out"],
    values: Float[Tensor, " nnz"],
    W_dec: Float[Tensor, "latents d_out"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
    need_values: bool,
    need_W: bool,
) -> tuple[Float[Tensor, " nnz"] | None, Float[Tensor, "latents d_out"] | None]:
    """Gradients of the decoded sum by the values (`<grad_out[row_j], W_dec[latent_j]>`) and by the weights."""
    grad_values = torch.empty_like(values) if need_values else None
    grad_W = torch.zeros_like(W_dec, memory_format=torch.contiguous_format) if need_W else None
    for rows, entries, cells, tile in _tiles(indices, offsets, W_dec):
        part = grad_out[rows]
        if grad_values is not None:
            torch.mm(part, W_dec.T, out=tile)
            torch.index_select(tile.view(-1), 0, cells, out=grad_values[entries])
        if grad_W is not None:
            _fill(tile, cells, values[entries])
            grad_W.addmm_(tile.T, part)
    return grad_values, grad_W


def affine_gradients(
    grad_z: Float[Tensor, " nnz"],
    x: Float[Tensor, "rows d_in"],
    W: Float[Tensor, "latents d_in"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
    need_x: bool,
    need_W: bool,
) -> tuple[Float[Tensor, "rows d_in"] | None, Float[Tensor, "latents d_in"] | None]:
    """Gradients of the selected pre-activations `<x[row_j], W[latent_j]>` by the input and by the weights."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_W = torch.zeros_like(W, memory_format=torch.contiguous_format) if need_W else None
    for rows, entries, cells, tile in _tiles(indices, offsets, W):
        _fill(tile, cells, grad_z[entries])
        if grad_x is not None:
            torch.mm(tile, W, out=grad_x[rows])
        if grad_W is not None:
            grad_W.addmm_(tile.T, x[rows])
    return grad_x, grad_W


def _fill(tile: Tensor, cells: Tensor, values: Tensor) -> None:
    tile.zero_().view(-1).index_add_(0, cells, values)


def _tiles(indices: Tensor, offsets: Tensor, table: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Tile after tile: its rows, its entries, their flat cells in it [entries], and room for it [rows, latents]."""
    n, n_latents = offsets.shape[0] - 1, table.shape[0]
    step = min(n, max(LEAST_ROWS, TILE_BYTES // (n_latents * table.element_size())))
    starts = list(range(0, n, step))
    if n - starts[-1] < LEAST_ROWS and len(starts) > 1:
        starts.pop()
    edges = [*starts, n]
    buffer = table.new_empty(max(b - a for a, b in pairwise(edges)), n_latents)
    ends = offsets[torch.tensor(edges, device=offsets.device)].tolist()
    for i, first in enumerate(starts):
        rows, entries = slice(first, edges[i + 1]), slice(ends[i], ends[i + 1])
        lengths = offsets[first : edges[i + 1] + 1].diff()
        cells = torch.arange(0, len(lengths) * n_latents, n_latents, device=offsets.device)
        cells = cells.repeat_interleave(lengths, output_size=ends[i + 1] - ends[i]).add_(indices[entries])
        yield rows, entries, cells, buffer[: len(lengths)]
