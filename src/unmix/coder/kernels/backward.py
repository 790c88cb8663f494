"""Kernels of the one backward pass, latent by latent, and of the optimiser's step that can end it."""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from unmix.coder.kernels.device import row_start


@triton.jit
@no_type_check
def adam(p, grad, first, second, low, rates, clip, place, inside, UNIT: tl.constexpr, LOW: tl.constexpr):
    """torch's Adam on a block of numbers that holds one row: moments, weight, and its copy in low precision.

    `rates` [6] float32: lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), β₁, β₂, ε, and 0 where nothing may be written.
    """
    if tl.load(rates + 5) > 0.0:
        rate, root = tl.load(rates), tl.load(rates + 1)
        beta_1, beta_2, eps = tl.load(rates + 2), tl.load(rates + 3), tl.load(rates + 4)
        grad = grad * tl.load(clip)
        m = tl.load(first + place, mask=inside, other=0.0)
        v = tl.load(second + place, mask=inside, other=0.0)
        old = tl.load(p + place, mask=inside, other=0.0)
        m = m + (1.0 - beta_1) * (grad - m)
        v = beta_2 * v + (1.0 - beta_2) * grad * grad
        new = old - rate * m / (tl.sqrt(v) * root + eps)
        if UNIT:
            new = new / tl.maximum(tl.sqrt(tl.sum(tl.where(inside, new * new, 0.0), 0)), 1e-12)
        tl.store(first + place, m, mask=inside)
        tl.store(second + place, v, mask=inside)
        tl.store(p + place, new, mask=inside)
        if LOW:
            tl.store(low + place, new.to(low.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def finish(
    latent, dec, enc, bias, g_dec, g_enc, g_b, squares,
    p_dec, p_enc, p_b, m_dec, m_enc, m_b, v_dec, v_enc, v_b, low_dec, low_enc, rates, clip, d_out, d_in,
    HAS_DEC: tl.constexpr, HAS_ENC: tl.constexpr, PROJECT: tl.constexpr, SQUARES: tl.constexpr, ADAM: tl.constexpr,
    UNIT: tl.constexpr, LOW_DEC: tl.constexpr, LOW_ENC: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """What becomes of one latent's summed gradients: written to memory, or Adam's step taken at once."""
    outs, ins = tl.arange(0, OUT), tl.arange(0, IN)
    of_out, of_in = row_start(latent, d_out) + outs, row_start(latent, d_in) + ins
    square = bias * bias
    if HAS_DEC:
        if PROJECT:
            unit = tl.load(p_dec + of_out, mask=outs < d_out, other=0.0)
            dec = dec - tl.sum(dec * unit, 0) * unit
        square += tl.sum(dec * dec, 0)
        if ADAM:
            adam(p_dec, dec, m_dec, v_dec, low_dec, rates, clip, of_out, outs < d_out, UNIT, LOW_DEC)
        else:
            tl.store(g_dec + of_out, dec, mask=outs < d_out)
    if HAS_ENC:
        square += tl.sum(enc * enc, 0)
        if ADAM:
            adam(p_enc, enc, m_enc, v_enc, low_enc, rates, clip, of_in, ins < d_in, False, LOW_ENC)
        else:
            tl.store(g_enc + of_in, enc, mask=ins < d_in)
    tl.store(g_b + latent, bias)
    if SQUARES:
        tl.store(squares + latent, square)
    if ADAM:
        one = tl.arange(0, 1)
        adam(p_b, bias + tl.zeros([1], tl.float32), m_b, v_b, p_b, rates, clip, latent + one, one == 0, False, False)


@triton.jit
@no_type_check
def latent_kernel(
    pieces, order, tokens, values, extra, grad_y, w_dec, x, grad_z, part_dec, part_enc, part_b,
    g_dec, g_enc, g_b, squares,
    p_dec, p_enc, p_b, m_dec, m_enc, m_b, v_dec, v_enc, v_b, low_dec, low_enc, rates, clip,
    n_latents, d_out, d_in, stride_dec, scale,
    HAS_DEC: tl.constexpr, HAS_ENC: tl.constexpr, HAS_EXTRA: tl.constexpr, RELU: tl.constexpr,
    PROJECT: tl.constexpr, SQUARES: tl.constexpr, ADAM: tl.constexpr, UNIT: tl.constexpr,
    LOW_DEC: tl.constexpr, LOW_ENC: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One piece of one latent's pairs: dL/dz of each, and the sums for its decoder row, encoder row and bias.

    The decoder row is read once and stays in registers with both sums; `TOKENS` pairs are in flight. `OUT` and `IN` are
    powers of two that hold a row. `grad_y` times `scale` is the gradient by the decoded sum, `extra` that by the values
    from elsewhere. `w_dec` may be of low precision; `p_dec` is the weight that learns.
    """
    piece = pieces + tl.program_id(0).to(tl.int64) * 4
    latent, first, end, slot = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2), tl.load(piece + 3)
    if latent < n_latents:
        outs, ins, steps = tl.arange(0, OUT), tl.arange(0, IN), tl.arange(0, TOKENS)
        dec, enc = tl.zeros([OUT], tl.float32), tl.zeros([IN], tl.float32)
        bias = tl.zeros([TOKENS], tl.float32)
        row = tl.zeros([OUT], tl.float32)
        if HAS_DEC:
            row = tl.load(w_dec + row_start(latent, stride_dec) + outs, mask=outs < d_out, other=0.0).to(tl.float32)
        for start in range(first, end, TOKENS):
            pairs = start + steps
            real = pairs < end
            token = tl.load(tokens + pairs, mask=real, other=0)
            entry = tl.load(order + pairs, mask=real, other=0)
            value = tl.load(values + entry, mask=real, other=0.0).to(tl.float32)
            dz = tl.zeros([TOKENS], tl.float32)
            if HAS_DEC:
                places = grad_y + row_start(token, d_out)[:, None] + outs[None, :]
                g = tl.load(places, mask=real[:, None] & (outs < d_out)[None, :], other=0.0).to(tl.float32) * scale
                dz += tl.sum(g * row[None, :], 1)
                dec += tl.sum(g * value[:, None], 0)
            if HAS_EXTRA:
                dz += tl.load(extra + entry, mask=real, other=0.0).to(tl.float32)
            if RELU:
                dz = tl.where(value > 0.0, dz, 0.0)
            if HAS_ENC:
                places = x + row_start(token, d_in)[:, None] + ins[None, :]
                xs = tl.load(places, mask=real[:, None] & (ins < d_in)[None, :], other=0.0).to(tl.float32)
                enc += tl.sum(xs * dz[:, None], 0)
            bias += dz
            tl.store(grad_z + entry, dz, mask=real)
        whole = tl.sum(bias, 0)
        if slot < 0:
            finish(
                latent, dec, enc, whole, g_dec, g_enc, g_b, squares,
                p_dec, p_enc, p_b, m_dec, m_enc, m_b, v_dec, v_enc, v_b, low_dec, low_enc, rates, clip, d_out, d_in,
                HAS_DEC, HAS_ENC, PROJECT, SQUARES, ADAM, UNIT, LOW_DEC, LOW_ENC, OUT, IN,
            )  # fmt: skip
        else:
            if HAS_DEC:
                tl.store(part_dec + row_start(slot, d_out) + outs, dec, mask=outs < d_out)
            if HAS_ENC:
                tl.store(part_enc + row_start(slot, d_in) + ins, enc, mask=ins < d_in)
            tl.store(part_b + slot, whole)


@triton.jit
@no_type_check
def sum_kernel(
    split, part_dec, part_enc, part_b, g_dec, g_enc, g_b, squares,
    p_dec, p_enc, p_b, m_dec, m_enc, m_b, v_dec, v_enc, v_b, low_dec, low_enc, rates, clip, d_out, d_in,
    HAS_DEC: tl.constexpr, HAS_ENC: tl.constexpr, PROJECT: tl.constexpr, SQUARES: tl.constexpr, ADAM: tl.constexpr,
    UNIT: tl.constexpr, LOW_DEC: tl.constexpr, LOW_ENC: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """The partial sums of one latent that was cut, in order of its pieces; then as for a whole one.

    With every latent as its own only piece this is the optimiser's step on gradients that are there already.
    """
    mine = split + tl.program_id(0).to(tl.int64) * 3
    latent, first, count = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    if latent >= 0:
        outs, ins = tl.arange(0, OUT), tl.arange(0, IN)
        dec, enc = tl.zeros([OUT], tl.float32), tl.zeros([IN], tl.float32)
        bias = tl.full([], 0.0, tl.float32)
        for i in range(count):
            slot = first + i
            if HAS_DEC:
                dec += tl.load(part_dec + row_start(slot, d_out) + outs, mask=outs < d_out, other=0.0)
            if HAS_ENC:
                enc += tl.load(part_enc + row_start(slot, d_in) + ins, mask=ins < d_in, other=0.0)
            bias += tl.load(part_b + slot)
        finish(
            latent, dec, enc, bias, g_dec, g_enc, g_b, squares,
            p_dec, p_enc, p_b, m_dec, m_enc, m_b, v_dec, v_enc, v_b, low_dec, low_enc, rates, clip, d_out, d_in,
            HAS_DEC, HAS_ENC, PROJECT, SQUARES, ADAM, UNIT, LOW_DEC, LOW_ENC, OUT, IN,
        )  # fmt: skip
