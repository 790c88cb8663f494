"""The plain twins of the kernels, in torch's own operations: what every kernel must equal, on any device.

Nothing here is `[tokens, latents]` either: products are cut into runs of latents, and a running top-k is merged with
each. Low-precision inputs are multiplied as they are and summed in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from unmix.coder.activations.selection import top_lowest
from unmix.coder.codes import offsets_of
from unmix.coder.kernels.rules import Found, TopRule

CHUNK = 4096
"""Latents scored at once."""
PAIRS = 2**16
"""Pairs whose rows are gathered at once."""


def product(x: Float[Tensor, "t d"], W: Float[Tensor, "f d"]) -> Float[Tensor, "t f"]:
    """`x Wᵀ` in float32 (float64 for float64), never rounded to the inputs' precision."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.mm(x, W.T)
    if x.is_cuda:
        return torch.mm(x, W.T, out_dtype=torch.float32)
    return torch.mm(x.float(), W.float().T)


def top(
    x: Float[Tensor, "t d"],
    W: Float[Tensor, "F d"],
    b: Float[Tensor, " F"],
    scale: Float[Tensor, " F"] | None,
    rule: TopRule,
    chunk: int = CHUNK,
) -> tuple[Int[Tensor, "t k"], Float[Tensor, "t k"]]:
    """`(latent ids int64 ascending, pre-activations)` of each token's k best; the lowest ids among equals."""
    ids, z = _none(x)
    for start in range(0, W.shape[0], max(chunk, rule.k)):
        part = slice(start, start + max(chunk, rule.k))
        scores = product(x, W[part]) + b[part]
        numbers = torch.arange(start, start + scores.shape[1], device=x.device).expand(len(x), -1)
        # What was kept stands before what is new, so that places are in order of id and ties fall as they should.
        ids, z = torch.cat([ids, numbers], 1), torch.cat([z, scores], 1)
        gate = rule.gate(z, None if scale is None else scale[ids])
        best = top_lowest(gate, rule.k)
        ids, z = ids.gather(1, best), z.gather(1, best)
    return ids, z


def above(
    x: Float[Tensor, "t d"],
    W: Float[Tensor, "F d"],
    b: Float[Tensor, " F"],
    scale: Float[Tensor, " F"] | None,
    floor: Float[Tensor, " F"],
    on_scores: bool = False,
    chunk: int = CHUNK,
) -> Found:
    """Every pair whose gate (or score, with `on_scores`) lies above its latent's floor."""
    rows: list[Tensor] = []
    ids: list[Tensor] = []
    kept: list[Tensor] = []
    for start in range(0, W.shape[0], chunk):
        part = slice(start, start + chunk)
        z = product(x, W[part]) + b[part]
        gate = z if scale is None or on_scores else z * scale[part]
        row, column = (gate > floor[part]).nonzero(as_tuple=True)
        rows.append(row)
        ids.append(column + start)
        kept.append(z[row, column])
    row = torch.cat(rows)
    # Runs of latents follow each other, so a stable sort by token leaves ids ascending.
    order = torch.argsort(row, stable=True)
    offsets = offsets_of(torch.bincount(row, minlength=len(x)))
    return Found(torch.cat(kept)[order], torch.cat(ids)[order].to(torch.int32), offsets)


def decode(
    values: Float[Tensor, " nnz"],
    W_dec: Float[Tensor, "F d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
    bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "rows d"]:
    """`out[row] = Σ values_j · W_dec[latent_j] (+ bias)`, summed in float32."""
    if len(indices):
        out = functional.embedding_bag(
            indices.long(), _full(W_dec.detach()), offsets, mode="sum", per_sample_weights=_full(values.detach()),
            include_last_offset=True,
        )  # fmt: skip
    else:
        out = _full(W_dec).new_zeros(len(offsets) - 1, W_dec.shape[1])
    return out if bias is None else out + bias


def latent_gradients(
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " rows_plus_1"],
    values: Float[Tensor, " nnz"],
    grad_y: Float[Tensor, "rows d_out"] | None,
    W_dec: Float[Tensor, "F d_out"] | None,
    x: Float[Tensor, "rows d_in"] | None,
    extra: Float[Tensor, " nnz"] | None,
    n_latents: int,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """`(dL/dz [nnz], dL/dW_dec, dL/dW_enc, dL/db_enc)`; see `gradients.latent_gradients`."""
    ids = indices.long()
    rows = torch.arange(offsets.shape[0] - 1, device=ids.device)
    rows = rows.repeat_interleave(offsets.diff(), output_size=len(ids))
    grad_z = torch.zeros_like(values, dtype=torch.float32) if extra is None else _full(extra).clone()
    dec = enc = None
    if grad_y is not None and W_dec is not None:
        g = _full(grad_y)
        for part in torch.arange(len(ids), device=ids.device).split(PAIRS):
            grad_z[part] += (g[rows[part]] * _full(W_dec)[ids[part]]).sum(-1)
        dec = _summed(ids, rows, _full(values), g, n_latents)
    if relu:
        grad_z = torch.where(values > 0, grad_z, 0.0)
    if x is not None:
        enc = _summed(ids, rows, grad_z, _full(x), n_latents)
    return grad_z, dec, enc, grad_z.new_zeros(n_latents).index_add_(0, ids, grad_z)


def _summed(ids: Tensor, rows: Tensor, weights: Tensor, table: Tensor, n_latents: int) -> Tensor:
    """`out[id] += weight · table[row]` over all pairs, some at a time."""
    out = table.new_zeros(n_latents, table.shape[1])
    for part in torch.arange(len(ids), device=ids.device).split(PAIRS):
        out.index_add_(0, ids[part], weights[part].unsqueeze(1) * table[rows[part]])
    return out


def _none(x: Tensor) -> tuple[Tensor, Tensor]:
    """No ids and no scores of every row."""
    z = x.new_zeros(len(x), 0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.zeros(len(x), 0, dtype=torch.int64, device=x.device), z


def _full(t: Tensor) -> Tensor:
    """Low precision in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
