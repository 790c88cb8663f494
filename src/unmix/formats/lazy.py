"""Tensors that are made when they are asked for: a whole coder is converted in the memory of its largest tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SMALL = 2**22
"""Elements up to which a made tensor is kept: vectors are asked for by several others, matrices once."""


class Lazy:
    """A tensor that is read or computed on every call, save that small ones are kept after the first."""

    def __init__(self, make: Callable[[], Tensor], like: Tensor) -> None:
        """`like`: a tensor on the meta device of the shape and dtype that `make` returns."""
        self._make, self._like = make, like
        self._kept: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """A tensor that is there already."""
        return cls(lambda: tensor, torch.empty_like(tensor, device="meta"))

    @property
    def shape(self) -> tuple[int, ...]:
        """Known without making it."""
        return tuple(self._like.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Known without making it."""
        return self._like.dtype

    def __call__(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._kept is not None:
            return self._kept
        made = self._make()
        if made.numel() <= _SMALL:
            self._kept = made
        return made

    @property
    def like(self) -> Tensor:
        """Shape and dtype, as a tensor on the meta device."""
        return self._like


State = dict[str, Lazy]
"""A coder's parameters by name, not made yet."""


def apply(fn: Callable[..., Tensor], *inputs: Lazy) -> Lazy:
    """`fn` of the inputs, later. Its shape is found now, by running it on the meta device."""
    return Lazy(lambda: fn(*(lazy() for lazy in inputs)), fn(*(lazy.like for lazy in inputs)))
