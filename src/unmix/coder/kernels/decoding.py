"""Kernel of the sparse decode: weighted sums of a table's rows, and what a squared error makes of them."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from unmix.coder.kernels.device import row_start


@triton.jit
@no_type_check
def decode_kernel(
    values, table, indices, offsets, bias, target, out, squares, d, stride, parts,
    HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`out[row] = Σ values_j · table[indices_j] (+ bias) (− target)`; a program a row and block of `BLOCK` columns.

    With `RESIDUAL` the sum of squares of each block goes to `squares [rows, parts]` before `out` is rounded.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    steps = tl.arange(0, ROWS)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        entries = start + steps
        real = entries < last
        ids = tl.load(indices + entries, mask=real, other=0)
        weights = tl.load(values + entries, mask=real, other=0.0).to(tl.float32)
        places = table + row_start(ids, stride)[:, None] + columns[None, :]
        rows = tl.load(places, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weights[:, None] * rows, 0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    place = row_start(row, d)
    if RESIDUAL:
        total -= tl.load(target + place + columns, mask=inside, other=0.0).to(tl.float32)
        total = tl.where(inside, total, 0.0)
        tl.store(squares + row * parts + part, tl.sum(total * total, 0))
    tl.store(out + place + columns, total.to(out.dtype.element_ty), mask=inside)
