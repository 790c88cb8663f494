"""Sparse decode: weighted sums of decoder rows, and their distance from a target, in one pass."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.kernels.launching import interpreted, on_grid, power_of_two

WIDTH = 1024
"""Numbers of an output row that a program sums."""
TOGETHER = 4
"""Decoder rows read at once: loads in flight hide each other's latency."""


def decode(
    values: Float[Tensor, " nnz"],
    table: Float[Tensor, "F d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
    bias: Float[Tensor, " d"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows d"]:
    """`out[row] = Σ values_j · table[indices_j] (+ bias)`, summed in float32. Also the input's gradient."""
    return _launch(values, table, indices, offsets, bias, None, dtype)[0]


def residual(
    values: Float[Tensor, " nnz"],
    table: Float[Tensor, "F d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
    bias: Float[Tensor, " d"],
    target: Float[Tensor, "rows d"],
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, " rows"]]:
    """`(decoded − target, its sum of squares a row in float32)`; the difference in `dtype`."""
    return _launch(values, table, indices, offsets, bias, target.contiguous(), dtype)


def _launch(
    values: Tensor, table: Tensor, indices: Tensor, offsets: Tensor, bias: Tensor | None, target: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, d = offsets.shape[0] - 1, table.shape[1]
    width = min(power_of_two(d, 16), 32 if interpreted() else WIDTH)
    parts = -(-d // width)
    out = torch.empty(rows, d, dtype=dtype, device=table.device)
    squares = torch.zeros(rows, parts, dtype=torch.float32, device=table.device)
    if rows:
        from unmix.coder.kernels.decoding import decode_kernel

        on_grid(decode_kernel, rows, parts)(
            values, table, indices, offsets, bias, target, out, squares, d, table.stride(0), parts,
            HAS_BIAS=bias is not None, RESIDUAL=target is not None, BLOCK=width, ROWS=TOGETHER, num_warps=4,
        )  # fmt: skip
    return out, squares.sum(-1)
