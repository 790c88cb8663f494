"""Places of a context: all, the prompt, what is generated, given ones, or those where a latent fires."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.core.errors import ConfigError

Range = Literal["all", "prompt", "generated"] | Sequence[int]
"""Places that are known before the model runs. Given ones count from the first token of a text, padding left out."""


@dataclass(frozen=True, kw_only=True)
class Fires:
    """The places where a latent's value is above `above`, in the coder's latent units.

    `coder` names another bound coder, which must run earlier in the pass, and is seen after its interventions; the
    intervention's own coder is seen as the interventions before this one left it.
    """

    latent: int
    coder: str | None = None
    above: float = 0.0
    within: Range = "all"
    """Only among these places."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "within", checked_range(self.within))
        if self.latent < 0:
            raise ConfigError(f"latent is {self.latent}; latents count from 0")


Where = Range | Fires
"""Which positions of a context an intervention touches."""

Fired = Callable[[Fires], Tensor]
"""Answers a `Fires` with a bool mask over the rows [batch · pos] of the pass at hand."""


def checked_range(where: Any) -> Range:
    """`where` with places as a tuple; `ConfigError` for another word or a negative place."""
    if where == "all" or where == "prompt" or where == "generated":
        return where
    if isinstance(where, str) or not isinstance(where, Iterable):
        raise ConfigError(f"where is {where!r}; allowed: all, prompt, generated, or a list of positions")
    places = tuple(int(place) for place in cast("Iterable[Any]", where))
    if any(place < 0 for place in places):
        raise ConfigError(f"where holds {min(places)}; positions count from 0, the first token of the text")
    return places


def checked_where(where: Any) -> Where:
    """`where` with places as a tuple; `ConfigError` for what is no place."""
    return where if isinstance(where, Fires) else checked_range(where)


def range_of(where: Where) -> Range:
    """What of `where` is known before the model runs."""
    return where.within if isinstance(where, Fires) else where


@dataclass(frozen=True)
class Span:
    """Which stretch of the contexts one pass covers: `length` columns from column `start`; the prompt has `prompt`."""

    start: int
    length: int
    prompt: int
    pads: Int[Tensor, " batch"] | None = None
    """Columns before the first token of each row, where prompts were padded on the left."""
    valid: Bool[Tensor, "batch length"] | None = None
    """False where a column holds padding."""

    def places(self, batch: int, device: torch.device) -> Int[Tensor, "batch length"]:
        """The place of each column in its own text; negative on left padding."""
        columns = torch.arange(self.start, self.start + self.length, device=device).expand(batch, self.length)
        return columns if self.pads is None else columns - self.pads.to(device).unsqueeze(1)

    def touches(self, where: Where) -> bool:
        """Whether `where` can mean any column of this stretch, as far as that is known beforehand."""
        asked = range_of(where)
        if asked == "prompt":
            return self.start < self.prompt
        if asked == "generated":
            return self.start + self.length > self.prompt
        return asked == "all" or len(asked) > 0


def columns_where(where: Range, batch: int, span: Span, device: torch.device) -> Bool[Tensor, "batch length"]:
    """True at the columns that `where` means; padding is never among them."""
    if where == "all":
        chosen = torch.ones(batch, span.length, dtype=torch.bool, device=device)
    elif isinstance(where, str):
        inside = torch.arange(span.start, span.start + span.length, device=device) < span.prompt
        chosen = (inside if where == "prompt" else ~inside).expand(batch, span.length)
    else:
        chosen = torch.isin(span.places(batch, device), torch.tensor(list(where), dtype=torch.int64, device=device))
    return chosen if span.valid is None else chosen & span.valid.to(device)


def rows_where(
    where: Where, batch: int, span: Span, device: torch.device, fired: Fired | None = None
) -> Bool[Tensor, " rows"]:
    """`where` as a mask over the rows of codes with leading dimensions [batch, span.length]."""
    if not isinstance(where, Fires):
        return columns_where(where, batch, span, device).reshape(-1)
    if fired is None:
        raise ConfigError(f"{where}: no coder's codes are at hand here")
    return columns_where(where.within, batch, span, device).reshape(-1) & fired(where).to(device)


def rows_firing(codes: Codes, latent: int, above: float) -> Bool[Tensor, " rows"]:
    """The rows of `codes` in which a latent's value is above `above` (its value is 0 where it is silent)."""
    rows = torch.full((codes.rows,), above < 0, dtype=torch.bool, device=codes.indices.device)
    held = codes.indices == latent
    rows[codes.token_rows()[held]] = codes.values[held].detach() > above
    return rows
