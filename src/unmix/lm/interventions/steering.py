"""Steering vectors: a direction added to an activation, with or without a coder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from unmix.core.errors import ConfigError
from unmix.lm.interventions.acts import Intervention


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """`scale · vector` is added to the activation at `hook`; or, with `latent`, `scale` times a decoder direction.

    A direction of a latent has norm 1 and is added where its coder writes, at positions that the coder's policy does
    not mask. A vector is added exactly where `where` says, a BOS token included. A vector given as a tensor stays one:
    gradients reach it.
    """

    vector: Tensor | Sequence[float] | None = None
    scale: float = 1.0
    _: KW_ONLY
    hook: str | None = None
    latent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale", float(self.scale))
        if (self.vector is None) == (self.latent is None):
            raise ConfigError("Steer needs a vector with its hook, or a latent (one of the two)")
        if self.vector is not None and self.hook is None:
            raise ConfigError("Steer: say at which hook the vector is added: Steer(vector, scale, hook=...)")
        if self.latent is not None and self.hook is not None:
            raise ConfigError("Steer: a latent is steered where its coder writes; hook goes with a vector")
        if self.latent is not None and self.latent < 0:
            raise ConfigError(f"latent is {self.latent}; latents count from 0")
        if not math.isfinite(self.scale):
            raise ConfigError(f"Steer: scale is {self.scale}, which is not finite")
        if self.vector is not None:
            self._check_vector()

    def _check_vector(self) -> None:
        given: Any = self.vector
        if not isinstance(given, Tensor):
            given = torch.tensor([float(number) for number in given], dtype=torch.float32)
            object.__setattr__(self, "vector", given)
        if given.ndim != 1 or not given.is_floating_point():
            raise ConfigError(f"Steer: a vector is [d] of floating point, found {given.dtype} {list(given.shape)}")
        if not bool(given.detach().isfinite().all()):
            raise ConfigError("Steer: the vector is not finite")

    def scaled(self, strength: float) -> Self:
        """`strength` times as far."""
        return replace(self, scale=self.scale * strength)

    def direction(self) -> Tensor:
        """The vector [d]; `ConfigError` where a latent is meant."""
        if not isinstance(self.vector, Tensor):
            raise ConfigError(f"{self!r} has no vector of its own")
        return self.vector

    def __eq__(self, other: object) -> bool:
        """Same numbers at the same place."""
        if not isinstance(other, Steer):
            return NotImplemented
        mine = (self.scale, self.hook, self.latent, self.where, self.coder)
        if mine != (other.scale, other.hook, other.latent, other.where, other.coder):
            return False
        if self.vector is None or other.vector is None:
            return self.vector is other.vector
        return torch.equal(self.direction().detach().cpu(), other.direction().detach().cpu())

    def __hash__(self) -> int:
        """By everything but the vector's numbers."""
        return hash((self.scale, self.hook, self.latent, self.where, self.coder))

    def __repr__(self) -> str:
        """One line, without the vector's numbers."""
        if self.latent is not None:
            along = f"latent={self.latent}"
        else:
            along = f"vector [{len(self.direction())}], hook={self.hook!r}"
        return f"Steer({along}, scale={self.scale:g}, where={self.where!r}, coder={self.coder!r})"
