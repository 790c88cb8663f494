"""Interventions on latents: set, add, multiply, ablate, clamp, at chosen positions.

They speak the coder's latent units and act on `Codes`. Giving a value to a latent that was silent lengthens the
token's row; it never evicts another latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError

Where = Literal["all", "prompt", "generated"] | Sequence[int]
"""Which positions of a context: all, those of the prompt, those generated after it, or a list of places."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What is done to one latent. `coder` names the coder where several are bound."""

    latent: int
    where: Where = "all"
    coder: str | None = None

    fills = False
    """Whether a latent that is silent is given a value too."""

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            self.check_where(self.where)
        if self.latent < 0:
            raise ConfigError(f"latent is {self.latent}; latents count from 0")

    @staticmethod
    def check_where(where: str) -> None:
        """`ConfigError` for a word that is not a place."""
        if where not in ("all", "prompt", "generated"):
            raise ConfigError(f"where is {where!r}; allowed: all, prompt, generated, or a list of positions")

    def change(self, values: Tensor) -> Tensor:
        """New values of the latent where its values are `values` (0 where it is silent)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Set(Intervention):
    """The latent is `value`, whether it fired or not."""

    value: float
    fills = True

    def change(self, values: Tensor) -> Tensor:
        """`value` everywhere."""
        return torch.full_like(values, self.value)


@dataclass(frozen=True, kw_only=True)
class Add(Intervention):
    """`value` is added, to 0 where the latent is silent."""

    value: float
    fills = True

    def change(self, values: Tensor) -> Tensor:
        """values + value."""
        return values + self.value


@dataclass(frozen=True, kw_only=True)
class Multiply(Intervention):
    """The latent's activation is scaled by `factor`; a silent latent stays silent."""

    factor: float

    def change(self, values: Tensor) -> Tensor:
        """values × factor."""
        return values * self.factor


@dataclass(frozen=True, kw_only=True)
class Ablate(Intervention):
    """The latent is 0."""

    def change(self, values: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(values)


@dataclass(frozen=True, kw_only=True)
class Clamp(Intervention):
    """The activation (0 where silent) is kept between `minimum` and `maximum`; either may be absent."""

    minimum: float | None = None
    maximum: float | None = None
    fills = True

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.minimum, self.maximum
        if low is None and high is None:
            raise ConfigError("Clamp needs a minimum, a maximum or both")
        if low is not None and high is not None and low > high:
            raise ConfigError(f"Clamp: minimum {low} is above maximum {high}")

    def change(self, values: Tensor) -> Tensor:
        """values between the bounds."""
        return values.clamp(self.minimum, self.maximum)


@dataclass(frozen=True)
class Span:
    """Which stretch of a context a pass covers: it starts at `start`; the prompt has `prompt` tokens."""

    start: int
    length: int
    prompt: int


def rows_where(where: Where, batch: int, span: Span, device: torch.device) -> Bool[Tensor, " rows"]:
    """The rows of codes with leading dimensions [batch, span.length] that `where` means."""
    places = torch.arange(span.start, span.start + span.length, device=device)
    if isinstance(where, str):
        chosen = {"all": places >= 0, "prompt": places < span.prompt, "generated": places >= span.prompt}[where]
    else:
        chosen = torch.isin(places, torch.tensor(list(where), dtype=torch.int64, device=device))
    return chosen.repeat(batch)


def apply_intervention(codes: Codes, act: Intervention, rows: Bool[Tensor, " rows"]) -> Codes:
    """`codes` with `act` done in `rows`. Every other entry, and the gradient of each, stays as it is."""
    owner = codes.token_rows()
    hit = (codes.indices == act.latent) & rows[owner]
    values = torch.where(hit, act.change(codes.values), codes.values)
    codes = replace(codes, values=values)
    if not act.fills:
        return codes
    holds = torch.zeros(codes.rows, dtype=torch.bool, device=rows.device)
    holds[owner[hit]] = True
    empty = (rows & ~holds).nonzero().squeeze(-1)
    added = act.change(codes.values.new_zeros(len(empty)))
    if not len(empty) or not bool(added.any()):
        return codes
    return _insert(codes, act.latent, empty, added)


def apply_all(codes: Codes, acts: Sequence[Intervention], batch: int, span: Span) -> Codes:
    """`codes` [batch, span.length] after every intervention, in the order given."""
    for act in acts:
        rows = rows_where(act.where, batch, span, codes.indices.device)
        if bool(rows.any()):
            codes = apply_intervention(codes, act, rows)
    return codes


def _insert(codes: Codes, latent: int, rows: Tensor, values: Tensor) -> Codes:
    """One more entry in each of `rows`, in its place by latent id."""
    owner = torch.cat([codes.token_rows(), rows])
    indices = torch.cat([codes.indices, codes.indices.new_full((len(rows),), latent)])
    order = (owner * codes.n_latents + indices).argsort(stable=True)
    lengths = codes.offsets.diff()
    lengths = lengths.index_add(0, rows, torch.ones_like(rows))
    offsets = torch.cat([codes.offsets.new_zeros(1), lengths.cumsum(0)])
    grown = codes.uniform_k is not None and len(rows) == codes.rows
    return replace(
        codes,
        indices=indices[order],
        values=torch.cat([codes.values, values])[order],
        offsets=offsets,
        uniform_k=codes.uniform_k + 1 if grown and codes.uniform_k is not None else None,
    )
