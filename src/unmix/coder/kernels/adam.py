"""What the optimiser's step needs, for the kernel that ends the backward pass with it, and its plain twin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Row:
    """One parameter with a row (or a number) a latent, Adam's moments beside it, and low-precision copies to keep."""

    weight: Tensor
    first: Tensor
    second: Tensor
    low: Tensor | None = None
    """The copy that is read."""
    spare: Tensor | None = None
    """Where the kernel writes the next one, where the old one is still needed."""

    @classmethod
    def fresh(cls, weight: Tensor, low: torch.dtype | None = None, spare: bool = False) -> Row:
        """Moments of zero; a copy in `low` where that is asked for, and room for the next one."""
        copy = None if low is None else weight.detach().to(low, copy=True)
        moments = torch.zeros_like(weight), torch.zeros_like(weight)
        return cls(weight.detach(), *moments, copy, torch.empty_like(copy) if spare and copy is not None else None)

    @property
    def written(self) -> Tensor | None:
        """The copy that a step writes."""
        return self.low if self.spare is None else self.spare


@dataclass(frozen=True)
class Dictionary:
    """The latent-major parameters of a coder under training: `[F, d_out]`, `[F, d_in]`, `[F]`, all float32."""

    dec: Row
    enc: Row
    bias: Row

    def swap(self) -> None:
        """After a step: read the copies that it wrote."""
        for row in (self.dec, self.enc):
            if row.spare is not None:
                row.low, row.spare = row.spare, row.low


@dataclass(frozen=True)
class Adam:
    """Settings of one step, as `torch.optim.Adam` has them; `step` counts from 1."""

    lr: float
    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def rates(self, device: torch.device, go: Tensor | None = None) -> Tensor:
        """The numbers that the kernel reads; `go` (one bool on the device) stops it where it is false."""
        first, second = self.betas
        rates = torch.tensor(
            [self.lr / (1 - first**self.step), (1 - second**self.step) ** -0.5, first, second, self.eps, 1.0],
            dtype=torch.float32,
        ).to(device, non_blocking=True)
        if go is not None:
            rates[5] = go
        return rates


def plain_step(row: Row, grad: Tensor, adam: Adam, clip: Tensor | float = 1.0, unit: bool = False) -> None:
    """The plain twin of the step: torch's Adam, then rows back to norm 1 with `unit`, then the copy."""
    first, second = adam.betas
    grad = grad * clip
    row.first.lerp_(grad, 1 - first)
    row.second.mul_(second).addcmul_(grad, grad, value=1 - second)
    root = (row.second / (1 - second**adam.step)).sqrt_().add_(adam.eps)
    row.weight.addcdiv_(row.first, root, value=-adam.lr / (1 - first**adam.step))
    if unit:
        row.weight.div_(row.weight.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    if row.low is not None:
        row.low.copy_(row.weight)


def projected(grad: Tensor, weight: Tensor) -> Tensor:
    """The plain twin of the projection: what points along each (unit) row taken out."""
    return grad - (grad * weight).sum(-1, keepdim=True) * weight
