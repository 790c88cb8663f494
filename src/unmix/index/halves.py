"""Activations in 16 bits: float16 relative to a power of two that every (segment, latent) has of its own.

The power is chosen so that the largest |value| of the latent in the segment lies in [2^14, 2^15): values down to
2^-29 of it keep float16's 11 significant bits, smaller ones lie on a grid 2^-39 to 2^-38 of it wide. Storing rounds
to 11 bits and then truncates to that grid (to one unit at least, sign kept: a firing stays a firing); reading
truncates to the grid of the latent's largest value over *all* segments. Truncations to ever coarser grids of powers
of two compose, so what is read does not depend on how the postings were cut into segments. Values that round as the
largest does are read as the largest exactly, whose float32 every segment keeps: the strongest firing loses nothing.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float16, Float32, Int64, UInt16

TOP = 15
SMALLEST_NORMAL = np.float32(2.0**-14)
UNIT = 24
"""2^-24 is float16's smallest step."""
LARGEST = np.uint16(0x7800)
"""Bits of 2^15, the largest strength that is ever stored."""
PLAIN = 126
"""float32 scales by 2^±126 exactly; beyond (latents below 1e-34 or so) float64 does it."""


def shifts(maxima: Float32[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """The power of two of each row: `value = half · 2^shift`."""
    return np.frexp(maxima)[1].astype(np.int64) - TOP


def to_half(
    values: Float32[np.ndarray, " n"], counts: Int64[np.ndarray, " rows"], maxima: Float32[np.ndarray, " rows"]
) -> Float16[np.ndarray, " n"]:
    """What is stored of rows of values, `maxima` being each row's largest |value|."""
    scaled = _scaled(values, counts, -shifts(maxima))
    strength = np.abs(scaled)
    with np.errstate(under="ignore"):
        half = scaled.astype(np.float16)
    small = np.flatnonzero(strength < SMALLEST_NORMAL)
    if len(small):
        steps = np.ldexp(_eleven_bits(strength[small]).astype(np.float64), UNIT)
        half[small] = np.copysign(np.ldexp(np.maximum(np.trunc(steps), 1), -UNIT), values[small]).astype(np.float16)
    return half


def from_half(
    half: Float16[np.ndarray, " n"],
    counts: Int64[np.ndarray, " rows"],
    maxima: Float32[np.ndarray, " rows"],
    whole: Float32[np.ndarray, " rows"],
) -> Float32[np.ndarray, " n"]:
    """The values of rows: `maxima` are the rows' own, `whole` those of their latents over all segments."""
    own, coarse = shifts(maxima), shifts(whole)
    values = _scaled(half.astype(np.float32), counts, own)
    bits = strengths(half)
    if (coarse > own).any():
        _truncate(values, half, bits, counts, own, coarse)
    # Only in a segment with the latent's largest value can anything round as that does; 2^15 is never passed.
    top = top_strengths(maxima)
    same = 1024 * own + top == 1024 * coarse + top_strengths(whole)
    equal = np.flatnonzero(bits == _by_row(np.where(same, top, LARGEST + 1).astype(np.uint16), counts))
    values[equal] = np.copysign(whole[_row_of(equal, counts)], half[equal])
    return values


def top_strengths(maxima: Float32[np.ndarray, " rows"]) -> Float32[np.ndarray, " rows"]:
    """The bits, as a number, that each row's largest |value| is stored as; NaN where that is not finite.

    The 11 bits 1024 to 2048 of a number in [2^14, 2^15], whose float16 exponent is 29: 2048 carries into it.
    """
    return np.rint(np.frexp(maxima)[0] * np.float32(2048)) + np.float32(28 * 1024)


def maxima(values: Float32[np.ndarray, " n"], counts: Int64[np.ndarray, " rows"]) -> Float32[np.ndarray, " rows"]:
    """max |value| of each row; 0 where it is empty."""
    result = np.zeros(len(counts), np.float32)
    alive = np.flatnonzero(counts)
    if len(alive):
        starts = (np.cumsum(counts) - counts)[alive]
        result[alive] = np.maximum.reduceat(np.abs(values), starts)
    return result


def strengths(half: Float16[np.ndarray, " n"]) -> UInt16[np.ndarray, " n"]:
    """|half| as its bits, which order as the numbers do."""
    return half.view(np.uint16) & np.uint16(0x7FFF)


def _scaled(
    values: Float32[np.ndarray, " n"], counts: Int64[np.ndarray, " rows"], by: Int64[np.ndarray, " rows"]
) -> Float32[np.ndarray, " n"]:
    """`values · 2^by`; what is too small for float32 becomes 0 or nearly, and never counts more than one step."""
    with np.errstate(under="ignore", over="ignore"):
        if len(by) and np.abs(by).max() > PLAIN:
            return np.ldexp(values.astype(np.float64), np.repeat(by, counts)).astype(np.float32)
        return values * _by_row(np.ldexp(np.float32(1), by), counts)


def _truncate(
    values: Float32[np.ndarray, " n"],
    half: Float16[np.ndarray, " n"],
    bits: UInt16[np.ndarray, " n"],
    counts: Int64[np.ndarray, " rows"],
    own: Int64[np.ndarray, " rows"],
    coarse: Int64[np.ndarray, " rows"],
) -> None:
    """Put the values of rows with a scale below their latent's on the latent's grid, in place."""
    with np.errstate(over="ignore"):
        limit = np.ldexp(SMALLEST_NORMAL, coarse - own).astype(np.float16)
    limit[coarse == own] = 0
    small = np.flatnonzero(bits < _by_row(limit.view(np.uint16), counts))
    row = _row_of(small, counts)
    steps = np.trunc(np.ldexp(np.abs(half[small].astype(np.float64)), (own - coarse)[row] + UNIT))
    kept = np.ldexp(np.maximum(steps, 1), coarse[row] - UNIT)
    values[small] = np.copysign(kept, half[small]).astype(np.float32)


def _by_row(array: np.ndarray, counts: Int64[np.ndarray, " rows"]) -> np.ndarray:
    """Each row's number for each of its values; a single row's is left to broadcasting."""
    return array if len(counts) == 1 else np.repeat(array, counts)


def _row_of(places: Int64[np.ndarray, " m"], counts: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " m"]:
    return np.searchsorted(np.cumsum(counts), places, "right")


def _eleven_bits(strength: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Rounded to 11 significant bits, to even where halfway."""
    bits = strength.view(np.uint32)
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    return ((bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)).view(np.float32)
