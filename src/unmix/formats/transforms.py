"""Named transforms of one tensor between a published layout and the coder's own.

A key map names one for each stored tensor; each has its inverse, so one map serves reading and writing. They must run
on the meta device too: shapes are known before data is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """From the stored tensor to the coder's, and back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def _transpose(t: Tensor) -> Tensor:
    return t.T


def _flatten(t: Tensor) -> Tensor:
    return t.flatten(1)


def _one_way(t: Tensor) -> Tensor:
    raise NotImplementedError("this transform only reads")


TRANSFORMS: Mapping[str, Transform] = {
    "same": Transform(_same, _same),
    "transpose": Transform(_transpose, _transpose),
    "exp": Transform(torch.exp, torch.log),
    # Crosscoders: [latents, hooks, d] to [latents, hooks · d].
    "join_hooks": Transform(_flatten, _one_way),
}
