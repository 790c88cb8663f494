"""The one backward pass: launches `latent_kernel`, then `sum_kernel` for latents that were cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmix.coder.kernels.adam import Adam, Dictionary
from unmix.coder.kernels.launching import on_grid, pass_shape, power_of_two
from unmix.coder.kernels.pairs import PIECE, Pairs, by_latent


@dataclass(frozen=True)
class Gradients:
    """Sums over the tokens of a batch; None for what was not asked, or was spent on the optimiser's step at once."""

    z: Float[Tensor, " nnz"]
    """By each pre-activation, in the codes' order."""
    dec: Float[Tensor, "F d_out"] | None
    enc: Float[Tensor, "F d_in"] | None
    bias: Float[Tensor, " F"]
    """By the encoder's bias."""
    squares: Float[Tensor, " F"] | None
    """Each latent's sum of squares over decoder, encoder and bias, after projection: their sum is the squared norm."""


@dataclass(frozen=True)
class Ending:
    """What is done with a latent's sums while they are in registers."""

    project: bool = False
    """Take out of the decoder's gradient what points along its row (`params`' float32 one)."""
    squares: bool = False
    params: Dictionary | None = None
    adam: Adam | None = None
    """Take its step on `params`; their gradients are then never written."""
    clip: Tensor | None = None
    """One float32 that gradients are multiplied by before the step."""
    unit: bool = False
    """Put decoder rows back to norm 1 after the step."""
    go: Tensor | None = None
    """One bool on the device; false: no weight and no moment is touched."""


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
    scale: float = 1.0,
    ending: Ending | None = None,
    pairs: Pairs | None = None,
    piece: int = PIECE,
) -> Gradients:
    """Every gradient that is a sum over a latent's tokens, with each latent's rows read and written once.

    `values` are the codes (after the ReLU, with `relu`: dL/dz is 0 where they are); `grad_y · scale` the gradient by
    the decoded sum, with the decoder `W_dec` in any precision; `extra` the gradient by the values from elsewhere; `x`
    the centred input. Leave out decoder or encoder to do without. Deterministic.
    """
    pairs = by_latent(indices, offsets, n_latents, piece) if pairs is None else pairs
    ending = ending or Ending()
    device, dec, enc = indices.device, grad_y is not None and W_dec is not None, x is not None
    d_out = W_dec.shape[1] if dec and W_dec is not None else 1
    d_in = x.shape[1] if x is not None else 1
    grads = _room(indices.shape[0], n_latents, d_out if dec else 0, d_in if enc else 0, ending, device)
    parts = [torch.empty(pairs.slots, width, dtype=torch.float32, device=device) for width in (d_out, d_in, 1)]
    tail, flags = _ending(grads, ending, d_out, d_in, dec, enc, device)
    from unmix.coder.kernels.backward import latent_kernel

    head = (pairs.pieces, pairs.order, pairs.tokens, values, extra, _dense(grad_y), W_dec, _dense(x), grads.z, *parts)
    stride = W_dec.stride(0) if dec and W_dec is not None else 0
    on_grid(latent_kernel, len(pairs.pieces))(
        *head, *tail, n_latents, d_out, d_in, stride, scale,
        HAS_EXTRA=extra is not None, RELU=relu, TOKENS=pass_shape(max(flags["OUT"], flags["IN"])).tokens, **flags,
    )  # fmt: skip
    _sum(pairs.split, parts, tail, d_out, d_in, flags)
    return grads


def take_step(grads: Gradients, ending: Ending) -> None:
    """The optimiser's step of gradients that are there (after clipping by their norm, say), in one pass over memory."""
    dec, enc = grads.dec, grads.enc
    if dec is None or enc is None:
        raise ValueError("the optimiser's step needs the gradients of decoder and encoder")
    n, device = len(grads.bias), grads.bias.device
    numbers = torch.arange(n, device=device)
    split = torch.stack([numbers, numbers, torch.ones_like(numbers)], 1)
    tail, flags = _ending(grads, ending, dec.shape[1], enc.shape[1], True, True, device)
    _sum(split, [dec, enc, grads.bias], tail, dec.shape[1], enc.shape[1], flags)


def _room(nnz: int, n: int, d_out: int, d_in: int, ending: Ending, device: torch.device) -> Gradients:
    """Unwritten tensors for what will be written; width 0: not asked for."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    write = ending.adam is None
    return Gradients(
        empty(nnz), empty(n, d_out) if d_out and write else None, empty(n, d_in) if d_in and write else None, empty(n),
        empty(n) if ending.squares else None,
    )  # fmt: skip


def _ending(
    grads: Gradients, ending: Ending, d_out: int, d_in: int, dec: bool, enc: bool, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and settings that both kernels share."""
    params = ending.params
    needs = ending.project or ending.adam is not None
    if needs and params is None:
        raise ValueError("projection and the optimiser's step need the parameters")
    if ending.adam is not None and not (dec and enc):
        raise ValueError("the optimiser's step needs the gradients of decoder and encoder")
    rows = [] if params is None else [params.dec, params.enc, params.bias]
    weights, first, second = (
        [getattr(row, name) for row in rows] or [None] * 3 for name in ("weight", "first", "second")
    )
    copies = [row.written for row in rows[:2]] or [None, None]
    rates = clip = None
    if ending.adam is not None:
        rates = ending.adam.rates(device, ending.go)
        clip = torch.ones((), device=device) if ending.clip is None else ending.clip.float()
    widths = [power_of_two(d) for d in (d_out, d_in)]
    flags = {
        "HAS_DEC": dec, "HAS_ENC": enc, "PROJECT": ending.project, "SQUARES": ending.squares,
        "ADAM": ending.adam is not None, "UNIT": ending.unit,
        "LOW_DEC": copies[0] is not None, "LOW_ENC": copies[1] is not None,
        "OUT": widths[0], "IN": widths[1],
        "num_warps": pass_shape(max(widths)).warps,
    }  # fmt: skip
    tail = (grads.dec, grads.enc, grads.bias, grads.squares, *weights, *first, *second, *copies, rates, clip)
    return tail, flags


def _sum(
    split: Tensor, parts: list[Tensor], tail: tuple[Any, ...], d_out: int, d_in: int, flags: dict[str, Any]
) -> None:
    """Launch `sum_kernel` where there is anything to add up."""
    if len(split):
        from unmix.coder.kernels.backward import sum_kernel

        on_grid(sum_kernel, len(split))(split, *parts, *tail, d_out, d_in, **flags)


def _dense(t: Tensor | None) -> Tensor | None:
    """Rows one behind the other, as the kernel reads them."""
    return None if t is None else t.contiguous()
