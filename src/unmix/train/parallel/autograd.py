"""Sums over ranks inside autograd. The loss is one number that every rank holds, and each differentiates its own part.

A sum that all ranks go on with has the gradient 1 for each summand. A value that all ranks hold and each uses in its
own part has the sum of the parts' gradients. (Megatron-LM's pair g and f, Shoeybi et al. 2019, arXiv 1909.08053 §3.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from unmix.train.parallel.mesh import Axis, Mesh


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: Mesh, axis: Axis) -> Tensor:
        return mesh.sum_(part.detach().clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, mesh: Mesh, axis: Axis) -> Tensor:
        ctx.mesh, ctx.axis = mesh, axis
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.mesh.sum_(grads[0].clone(), ctx.axis), None, None


def summed(part: Tensor, mesh: Mesh, axis: Axis) -> Tensor:
    """Σ of the ranks' parts; each part's gradient is that of the sum."""
    return part if mesh.length(axis) == 1 else _Sum.apply(part, mesh, axis)  # pyright: ignore[reportReturnType]


def spread(whole: Tensor, mesh: Mesh, axis: Axis) -> Tensor:
    """The value itself; its gradient is the sum over the ranks that use it."""
    return whole if mesh.length(axis) == 1 else _Spread.apply(whole, mesh, axis)  # pyright: ignore[reportReturnType]
