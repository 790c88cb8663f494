"""What an attribution gives back: a table of nodes, errors apart from latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unmix.core.atomic import write_json
from unmix.core.errors import ConfigError
from unmix.lm.attribute.baselines import Baseline, Nodes
from unmix.lm.attribute.effects import Completeness, Effects
from unmix.lm.attribute.wiring import Wiring

Method = Literal["gradient", "ig", "patch"]
SCHEMA = "unmix-attribution-1"


@dataclass(frozen=True)
class LatentEffect:
    """One latent, at one position or over all of them."""

    coder: str
    latent: int
    effect: float
    """m as it is − m with the latent at its baseline: positive where the latent raises the metric."""
    context: int | None
    """Which prompt; `None` for a sum."""
    position: int | None
    """`None` for a sum over positions."""
    token: str
    """At `position`; of a sum, where the effect is strongest."""
    value: float
    """The latent's activation there."""
    baseline: float


@dataclass(frozen=True)
class ErrorEffect:
    """What the coders of a hook leave over, at one position or over all of them."""

    hook: str
    effect: float
    context: int | None
    position: int | None
    token: str


@dataclass(frozen=True)
class LatentTable:
    """The nodes of one coder, entry by entry."""

    contexts: Tensor
    positions: Tensor
    latents: Tensor
    values: Tensor
    baselines: Tensor
    effects: Tensor


@dataclass(frozen=True)
class Attribution:
    """Effects of latents and error terms on a metric."""

    method: Method
    baseline: Baseline
    metric: str
    value: Tensor
    """The metric [contexts]."""
    bare: Tensor | None
    """That of the model without coders, where `error="drop"` makes it another [contexts]."""
    tokens: list[list[str]]
    """Of each prompt; ids in brackets where the model has no tokenizer."""
    tables: dict[str, LatentTable]
    """By coder."""
    errors_at: dict[str, Tensor]
    """By write hook, effects [contexts, pos]."""
    completeness: dict[str, Completeness]
    """By group of coders; integrated gradients only."""

    def top(self, n: int = 10, per: Literal["latent", "position"] = "latent") -> list[LatentEffect]:
        """The `n` latents of the largest effects by absolute value, over all coders.

        `per="latent"` adds a latent's effects up over positions and prompts, `per="position"` does not.
        """
        if per not in ("latent", "position"):  # pyright: ignore[reportUnnecessaryContains]
            raise ConfigError(f"per is {per!r}; allowed: latent, position")
        found = [effect for name in self.tables for effect in self._top(name, n, per == "latent")]
        return sorted(found, key=lambda e: (-abs(e.effect), e.coder, e.latent))[:n]

    def errors(self, per: Literal["hook", "position"] = "hook") -> list[ErrorEffect]:
        """Effects of the error terms, strongest first: one a hook, or one a hook, prompt and position."""
        found: list[ErrorEffect] = []
        for hook, effects in self.errors_at.items():
            clean = effects.nan_to_num(0.0)
            if per == "hook":
                strongest = int(clean.abs().argmax())
                row, place = divmod(strongest, effects.shape[1])
                found.append(ErrorEffect(hook, float(clean.sum()), None, None, self.tokens[row][place]))
                continue
            for row, place in clean.nonzero().tolist():
                found.append(ErrorEffect(hook, float(clean[row, place]), row, place, self.tokens[row][place]))
        return sorted(found, key=lambda e: -abs(e.effect))

    def to_dict(self, n: int | None = None) -> dict[str, Any]:
        """Plain JSON values; `n` keeps the strongest latents alone (per position)."""
        count = sum(int(table.effects.isfinite().sum()) for table in self.tables.values())
        return {
            "schema": SCHEMA,
            "method": self.method,
            "baseline": self.baseline,
            "metric": {"name": self.metric, "value": self.value.tolist()},
            "bare": None if self.bare is None else self.bare.tolist(),
            "tokens": self.tokens,
            "latents": [vars(effect) for effect in self.top(count if n is None else n, per="position")],
            "errors": [vars(effect) for effect in self.errors(per="position")],
            "completeness": {
                name: {"effects": c.effects, "measured": c.measured, "gap": c.gap}
                for name, c in self.completeness.items()
            },
        }

    def to_json(self, path: str | Path, n: int | None = None) -> None:
        """Write `to_dict` to a file, atomically."""
        write_json(path, self.to_dict(n))

    def _top(self, name: str, n: int, summed: bool) -> list[LatentEffect]:
        table = self.tables[name]
        known = table.effects.isfinite()
        effects, latents = table.effects[known], table.latents[known]
        if not len(effects) or n < 1:
            return []
        entries = known.nonzero()[:, 0]
        if not summed:
            order = effects.abs().sort(descending=True, stable=True).indices[:n]
            return [self._entry(name, int(entries[i]), float(effects[i]), False) for i in order]
        ids, owner = latents.unique(return_inverse=True)
        totals = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, owner, effects.double())
        order = totals.abs().sort(descending=True, stable=True).indices[:n]
        found: list[LatentEffect] = []
        for i in order.tolist():
            own = (owner == i).nonzero()[:, 0]
            strongest = own[effects[own].abs().argmax()]
            found.append(self._entry(name, int(entries[strongest]), float(totals[i]), True))
        return found

    def _entry(self, name: str, entry: int, effect: float, summed: bool) -> LatentEffect:
        table = self.tables[name]
        row, place = int(table.contexts[entry]), int(table.positions[entry])
        return LatentEffect(
            name, int(table.latents[entry]), effect, None if summed else row, None if summed else place,
            self.tokens[row][place], float(table.values[entry]), float(table.baselines[entry]),
        )  # fmt: skip


def make_result(
    wiring: Wiring, tokens: Tensor, metric: str, nodes: Nodes, effects: Effects, method: Method, bare: Tensor | None
) -> Attribution:
    """Effects as a table, on the CPU."""
    length = tokens.shape[1]
    tables: dict[str, LatentTable] = {}
    for name, codes in nodes.codes.items():
        rows = codes.token_rows().cpu()
        tables[name] = LatentTable(
            torch.div(rows, length, rounding_mode="floor"), rows % length, codes.indices.long().cpu(),
            codes.values.float().cpu(), nodes.bases[name].float().cpu(), effects.latents[name],
        )  # fmt: skip
    return Attribution(
        method, nodes.kind, metric, nodes.metric.float().cpu(), None if bare is None else bare.float().cpu(),
        strings_of(wiring, tokens), tables, effects.errors, effects.completeness,
    )  # fmt: skip


def strings_of(wiring: Wiring, tokens: Tensor) -> list[list[str]]:
    """Display strings of token ids [batch, pos]."""
    lm = wiring.lm
    listed: list[list[int]] = tokens.tolist()
    if lm.has_tokenizer:
        return [lm.token_strings(row) for row in listed]
    return [[f"[{i}]" for i in row] for row in listed]


@dataclass(frozen=True)
class Agreement:
    """Two attributions of the same nodes, say an estimate and a measurement."""

    nodes: int
    """Latents at positions that both have, errors included."""
    pearson: float
    """Correlation over all of them."""
    latents: float
    """Correlation over latents alone; NaN for fewer than three."""
    largest_gap: float
    """Of any node, in units of the metric."""
    scale: float
    """The largest effect of the second by absolute value: what the gap is large or small beside."""


def agreement(estimate: Attribution, measured: Attribution) -> Agreement:
    """How close two attributions of the same prompt and coders are; `ConfigError` where their nodes differ."""
    one: list[Tensor] = []
    other: list[Tensor] = []
    for name in _same(list(estimate.tables), list(measured.tables)):
        a, b = estimate.tables[name], measured.tables[name]
        if not (torch.equal(a.latents, b.latents) and torch.equal(a.positions, b.positions)):
            raise ConfigError(f"coder {name!r}: the attributions are of different nodes")
        one.append(a.effects)
        other.append(b.effects)
    for hook in _same(list(estimate.errors_at), list(measured.errors_at)):
        one.append(estimate.errors_at[hook].reshape(-1))
        other.append(measured.errors_at[hook].reshape(-1))
    x, y = _both(one, other)
    if len(x) < 2:
        raise ConfigError(f"{len(x)} nodes in common: nothing to compare")
    count = len(estimate.tables)
    return Agreement(
        len(x), _pearson(x, y), _pearson(*_both(one[:count], other[:count])), float((x - y).abs().max()),
        float(y.abs().max()),
    )  # fmt: skip


def _both(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Effects that both know and that are not 0 in both."""
    x, y = torch.cat([torch.zeros(0), *one]).double(), torch.cat([torch.zeros(0), *other]).double()
    shared = x.isfinite() & y.isfinite() & ((x != 0) | (y != 0))
    return x[shared], y[shared]


def _pearson(x: Tensor, y: Tensor) -> float:
    if len(x) < 3:
        return float("nan")
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)) / spread if spread else float("nan")


def _same(one: Sequence[str], other: Sequence[str]) -> Sequence[str]:
    if set(one) != set(other):
        raise ConfigError(f"the attributions are of {', '.join(one)} and of {', '.join(other)}")
    return one
