"""An intervention on latents as numbers, and how it is done to `Codes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmix.coder.codes import Codes, offsets_of
from unmix.core.errors import ConfigError
from unmix.lm.interventions.acts import (
    Ablate,
    Add,
    Amount,
    Clamp,
    Intervention,
    LatentIntervention,
    Multiply,
    Set,
    Units,
    each,
)
from unmix.lm.interventions.distribution import Distribution
from unmix.lm.interventions.places import Fired, Fires, Span, Where, rows_firing, rows_where

MEAN = "mean_activation"
"""The coder's own statistic [n_latents]: mean activation over all positions, silent ones counted as 0."""


@dataclass(frozen=True)
class LatentFacts:
    """What an intervention may ask about a coder's latents."""

    coder: str
    n_latents: int
    statistics: Mapping[str, Tensor] = field(default_factory=lambda: {})
    distribution: Distribution | None = None

    def amounts(self, amount: Amount, units: Units, latents: Sequence[int]) -> list[float]:
        """One number a latent, in latent units; `ConfigError` where quantiles are asked of no distribution."""
        numbers = each(amount, len(latents))
        if units == "latent":
            return numbers
        if self.distribution is None:
            raise ConfigError(
                f'units="quantile" needs the distribution of coder {self.coder!r}: '
                "bind(..., distributions=...) takes a coder's index or what measure_latents gives"
            )
        return [self.distribution.quantile(latent, q) for latent, q in zip(latents, numbers, strict=True)]

    def means(self, latents: Sequence[int]) -> list[float]:
        """Mean of each latent; `ConfigError` where nothing that was given knows it."""
        if self.distribution is not None:
            return [self.distribution.mean(latent) for latent in latents]
        if MEAN in self.statistics:
            return [float(self.statistics[MEAN][latent]) for latent in latents]
        raise ConfigError(
            f'Ablate(to="mean"): coder {self.coder!r} has no statistic {MEAN!r} and no distribution was given; '
            "bind(..., distributions=...), or say the mean: to=0.3"
        )


Rule = Callable[[Tensor, Tensor], Tensor]
"""New values of entries, from their values [n] (0 where silent) and which of the change's latents each is [n]."""


@dataclass(frozen=True)
class Change:
    """An intervention with its numbers."""

    latents: tuple[int, ...]
    rule: Rule
    where: Where
    fills: bool
    evict: bool = False


def as_change(act: LatentIntervention, facts: LatentFacts) -> Change:
    """`act` for one coder. `ConfigError` where it needs a distribution or a mean that is not there."""
    n, where = act.latents, act.where
    if isinstance(where, Fires) and where.coder == facts.coder:
        where = replace(where, coder=None)
    if isinstance(act, Set):
        value = facts.amounts(act.value, act.units, n)
        return Change(n, lambda _, which: _pick(value, which), where, act.fills, act.evict)
    if isinstance(act, Add):
        value = facts.amounts(act.value, act.units, n)
        return Change(n, lambda values, which: values + _pick(value, which), where, act.fills, act.evict)
    if isinstance(act, Multiply):
        value = each(act.factor, len(n))
        return Change(n, lambda values, which: values * _pick(value, which), where, act.fills)
    if isinstance(act, Ablate):
        if act.to == "zero":
            return Change(n, lambda values, _: torch.zeros_like(values), where, False)
        value = facts.means(n) if isinstance(act.to, str) else each(act.to, len(n))
        return Change(n, lambda _, which: _pick(value, which), where, True)
    if isinstance(act, Clamp):
        low = None if act.minimum is None else facts.amounts(act.minimum, act.units, n)
        high = None if act.maximum is None else facts.amounts(act.maximum, act.units, n)
        return Change(n, lambda values, which: _bounded(values, which, low, high), where, act.fills)
    raise ConfigError(f"{type(act).__name__} is no intervention on latents")


def _pick(numbers: Sequence[float], which: Tensor) -> Tensor:
    if len(numbers) == 1 or len(set(numbers)) == 1:
        return torch.full(which.shape, numbers[0], device=which.device)
    return torch.tensor(list(numbers), device=which.device)[which]


def _bounded(values: Tensor, which: Tensor, low: Sequence[float] | None, high: Sequence[float] | None) -> Tensor:
    values = values if low is None else values.maximum(_pick(low, which).to(values.dtype))
    return values if high is None else values.minimum(_pick(high, which).to(values.dtype))


def apply_change(codes: Codes, change: Change, rows: Bool[Tensor, " rows"]) -> Codes:
    """`codes` with `change` done in `rows`. Every other entry, and the gradient of each, stays as it is."""
    if change.evict:
        return _apply_evicting(codes, change, rows)
    owner = codes.token_rows()
    which = _which(codes, change.latents)
    hit = (which >= 0) & rows[owner]
    if bool(hit.any()):
        new = change.rule(codes.values, which.clamp(min=0)).to(codes.values.dtype)
        codes = replace(codes, values=torch.where(hit, new, codes.values))
    if not change.fills:
        return codes
    missing = rows.unsqueeze(1).repeat(1, len(change.latents))
    missing[owner[hit], which[hit]] = False
    row, latent = missing.nonzero(as_tuple=True)
    added = change.rule(codes.values.new_zeros(len(row)), latent).to(codes.values.dtype)
    kept = added != 0
    if not bool(kept.any()):
        return codes
    ids = torch.tensor(change.latents, device=row.device)[latent[kept]]
    return _insert(codes, owner, row[kept], ids, added[kept])


def _which(codes: Codes, latents: Sequence[int]) -> Int[Tensor, " nnz"]:
    """Which of `latents` each entry is, −1 for none."""
    device = codes.indices.device
    table = torch.full((codes.n_latents,), -1, device=device)
    table[torch.tensor(list(latents), device=device)] = torch.arange(len(latents), device=device)
    return table[codes.indices.long()]


def _insert(codes: Codes, owner: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> Codes:
    """New entries (row, latent, value), each in its place by latent id."""
    owner = torch.cat([owner, rows])
    indices = torch.cat([codes.indices, ids.to(codes.indices.dtype)])
    order = (owner * codes.n_latents + indices).argsort(stable=True)
    lengths = codes.offsets.diff().index_add(0, rows, torch.ones_like(rows))
    grown, rest = divmod(len(rows), codes.rows)
    k = None if codes.uniform_k is None or rest else codes.uniform_k + grown
    if k is not None and not bool((lengths == k).all()):
        k = None
    return replace(
        codes, indices=indices[order], values=torch.cat([codes.values, values])[order],
        offsets=offsets_of(lengths), uniform_k=k,
    )  # fmt: skip


def _apply_evicting(codes: Codes, change: Change, rows: Bool[Tensor, " rows"]) -> Codes:
    """Latent by latent; one that a token lacks takes the slot of that token's smallest value, the first of equals.

    What earlier latents of the same change put there can be the smallest too. Tokens without an entry get one.
    """
    for place, latent in enumerate(change.latents):
        owner, which = codes.token_rows(), torch.full_like(codes.indices, place, dtype=torch.int64)
        hit = (codes.indices == latent) & rows[owner]
        new = change.rule(codes.values, which).to(codes.values.dtype)
        values = torch.where(hit, new, codes.values)
        lacking = rows.clone()
        lacking[owner[hit]] = False
        given = change.rule(values.new_zeros(1), which.new_full((1,), place)).to(values.dtype)
        empty = lacking & (codes.offsets.diff() == 0)
        slot = _smallest(codes, values.detach(), owner)[(lacking & ~empty)]
        indices = codes.indices.index_put((slot,), codes.indices.new_tensor(latent))
        values = values.index_put((slot,), given.squeeze(0))
        order = (owner * codes.n_latents + indices).argsort(stable=True)
        codes = replace(codes, indices=indices[order], values=values[order])
        bare = empty.nonzero().squeeze(-1)
        if len(bare):
            codes = _insert(codes, owner, bare, torch.full_like(bare, latent), given.expand(len(bare)))
    return codes


def _smallest(codes: Codes, values: Tensor, owner: Tensor) -> Int[Tensor, " rows"]:
    """The entry with the smallest value of each row (of rows without one, any)."""
    by_value = values.argsort(stable=True)
    order = by_value[owner[by_value].argsort(stable=True)]
    if not len(order):
        return codes.offsets[:-1]
    return order[codes.offsets[:-1].clamp(max=len(order) - 1)]


def apply_changes(codes: Codes, changes: Sequence[Change], batch: int, span: Span, fired: Fired | None = None) -> Codes:
    """`codes` [batch, span.length] after every change, in the order given.

    `fired` answers for other coders; of this one's latents the codes so far are looked at.
    """
    for change in changes:
        if not span.touches(change.where):
            continue

        def here(asked: Fires, so_far: Codes = codes) -> Tensor:
            if asked.coder is not None:
                if fired is None:
                    raise ConfigError(f"{asked}: no other coder's codes are at hand here")
                return fired(asked)
            return rows_firing(so_far, asked.latent, asked.above)

        rows = rows_where(change.where, batch, span, codes.indices.device, here)
        if bool(rows.any()):
            codes = apply_change(codes, change, rows)
    return codes


def apply_all(
    codes: Codes, acts: Sequence[Intervention], batch: int, span: Span, facts: LatentFacts | None = None
) -> Codes:
    """`codes` [batch, span.length] after every intervention on latents, in the order given."""
    known = facts or LatentFacts("", codes.n_latents)
    changes = [as_change(act, known) for act in acts if isinstance(act, LatentIntervention)]
    return apply_changes(codes, changes, batch, span)
