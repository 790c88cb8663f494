"""Whether a tensor holds only finite numbers, at the speed of one sum."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Elements a step: all temporaries stay under a few MB."""


def is_finite(tensor: Tensor) -> bool:
    """True where no element is NaN or infinite. Integers and booleans always are finite.

    NaN and infinity survive every sum, so a finite sum of a chunk proves the chunk; only one whose sum overflowed
    is looked at element by element.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return True
    tensor = tensor.detach()
    # Any order of the elements will do: a transposed weight is walked as it lies in memory.
    tensor = tensor.permute(sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d)))
    if tensor.is_contiguous():
        return all(_finite(chunk) for chunk in tensor.reshape(-1).split(_CHUNK))
    rows = max(1, _CHUNK * tensor.shape[0] // tensor.numel())
    return all(_finite(chunk) for chunk in tensor.split(rows))


def _finite(chunk: Tensor) -> bool:
    if chunk.dtype not in (torch.float32, torch.float64):
        chunk = chunk.to(torch.float32)
    return bool(chunk.sum().isfinite()) or bool(chunk.isfinite().all())
