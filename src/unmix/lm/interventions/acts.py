"""Interventions: set, add, multiply, ablate, clamp latents.

They are plain descriptions, made before any model is there; `changes.py` turns one into numbers for a coder and does
it. Giving a value to a latent that was silent lengthens the token's row; it never evicts another latent unless asked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, SupportsIndex, cast

from unmix.core.errors import ConfigError
from unmix.lm.interventions.places import Where, checked_where

Amount = float | Sequence[float]
"""One number for every latent, or one each."""
Units = Literal["latent", "quantile"]
"""`latent`: the coder's own. `quantile`: of the latent's distribution where it fires; see `value_at`."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What is done at which places. `coder` names the coder that is meant where several are bound."""

    where: Where = "all"
    coder: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", checked_where(self.where))

    def scaled(self, strength: float) -> Self:
        """The same at `strength` times its amount; `ConfigError` for kinds that have no amount to scale."""
        raise ConfigError(f"{type(self).__name__} has no strength to scale; Set, Add, Multiply and Steer have")


@dataclass(frozen=True, kw_only=True)
class LatentIntervention(Intervention):
    """What is done to one latent, or to several at once."""

    latent: SupportsIndex | Sequence[SupportsIndex]

    fills = False
    """Whether a latent that is silent is given a value too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "latent", _whole(self.latent))
        if not self.latents:
            raise ConfigError(f"{type(self).__name__} names no latent")
        if min(self.latents) < 0:
            raise ConfigError(f"latent is {min(self.latents)}; latents count from 0")
        twice = [latent for latent in self.latents if self.latents.count(latent) > 1] if len(self.latents) < 64 else []
        if twice or len(set(self.latents)) < len(self.latents):
            raise ConfigError(f"{type(self).__name__} names a latent twice{f': {twice[0]}' if twice else ''}")

    @property
    def latents(self) -> tuple[int, ...]:
        """The latents, one or several."""
        return (self.latent,) if isinstance(self.latent, int) else cast("tuple[int, ...]", self.latent)

    def _amount(self, name: str) -> None:
        """Check the field `name`: one finite number, or as many as there are latents, which become a tuple."""
        given = getattr(self, name)
        if given is None:
            return
        if isinstance(given, (int, float)):
            numbers = [float(given)]
            object.__setattr__(self, name, numbers[0])
        else:
            numbers = [float(number) for number in given]
            object.__setattr__(self, name, tuple(numbers))
            if len(numbers) != len(self.latents):
                raise ConfigError(
                    f"{type(self).__name__} has {len(numbers)} numbers in {name} for {len(self.latents)} latents"
                )
        if not all(math.isfinite(number) for number in numbers):
            raise ConfigError(f"{type(self).__name__}: {name} is {given}, which is not finite")


def _whole(given: Any) -> int | tuple[int, ...]:
    """One latent or several, of NumPy and tensors too; `ConfigError` for anything but whole numbers."""
    try:
        return operator.index(given)
    except TypeError:
        pass
    try:
        return tuple(operator.index(latent) for latent in given)
    except TypeError:
        raise ConfigError(f"latent is {given!r}; expected a whole number, or several") from None


def each(amount: Amount, n: int) -> list[float]:
    """One number for each of `n` latents."""
    return [float(amount)] * n if isinstance(amount, (int, float)) else [float(number) for number in amount]


def _times(amount: Amount, factor: float) -> Amount:
    return amount * factor if isinstance(amount, (int, float)) else tuple(number * factor for number in amount)


@dataclass(frozen=True, kw_only=True)
class _Valued(LatentIntervention):
    """Gives latents a value each, silent ones too."""

    value: Amount
    units: Units = "latent"
    evict: bool = False
    """Give a silent latent the slot of the token's smallest entry, as OpenSAE does, in place of a slot of its own."""
    fills = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._amount("value")
        _check_units(self.units)

    def scaled(self, strength: float) -> Self:
        """With `strength` times the value."""
        return replace(self, value=_times(self.value, strength))


@dataclass(frozen=True, kw_only=True)
class Set(_Valued):
    """The latent is `value`, whether it fired or not."""


@dataclass(frozen=True, kw_only=True)
class Add(_Valued):
    """`value` is added, to 0 where the latent is silent."""


@dataclass(frozen=True, kw_only=True)
class Multiply(LatentIntervention):
    """The latent's activation is scaled by `factor`; a silent latent stays silent."""

    factor: Amount

    def __post_init__(self) -> None:
        super().__post_init__()
        self._amount("factor")

    def scaled(self, strength: float) -> Self:
        """From no change (0) to `factor` (1) and beyond: 1 + strength · (factor − 1)."""
        factors = [1 + strength * (factor - 1) for factor in each(self.factor, len(self.latents))]
        return replace(self, factor=factors[0] if isinstance(self.factor, (int, float)) else tuple(factors))


@dataclass(frozen=True, kw_only=True)
class Ablate(LatentIntervention):
    """The latent is 0, or its mean (over all positions, silent ones counted as 0), or a mean given as a number.

    `to="mean"` takes the mean from the distribution given to `bind`, else from the coder's own statistics.
    """

    to: Literal["zero", "mean"] | Amount = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.to, str):
            self._amount("to")
        elif self.to not in ("zero", "mean"):
            raise ConfigError(f"Ablate: to is {self.to!r}; allowed: zero, mean, or a number")


@dataclass(frozen=True, kw_only=True)
class Clamp(LatentIntervention):
    """The activation (0 where silent) is kept between `minimum` and `maximum`; either may be absent."""

    minimum: Amount | None = None
    maximum: Amount | None = None
    units: Units = "latent"
    fills = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimum is None and self.maximum is None:
            raise ConfigError("Clamp needs a minimum, a maximum or both")
        self._amount("minimum")
        self._amount("maximum")
        _check_units(self.units)
        if self.minimum is not None and self.maximum is not None:
            n = len(self.latents)
            for low, high in zip(each(self.minimum, n), each(self.maximum, n), strict=True):
                if low > high:
                    raise ConfigError(f"Clamp: minimum {low} is above maximum {high}")


def _check_units(units: str) -> None:
    if units not in ("latent", "quantile"):
        raise ConfigError(f"units is {units!r}; allowed: latent, quantile")
