"""A sweep: one run file, some of its fields varied. Members that differ in coder and training share one stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from unmix.core.config import Config, apply_overrides, build, read_yaml
from unmix.core.errors import ConfigError
from unmix.core.seeds import derive, slug
from unmix.run.config import OneOfMany, RunConfig
from unmix.train.config import OptimConfig

OWN = ("coder.", "train.")
"""Sections in which members of one run may differ."""


class Range(Config):
    """Numbers to draw from, for `method: random`."""

    low: PositiveFloat
    high: PositiveFloat
    log: bool = True
    """Evenly in the logarithm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g}, high {self.high:g}: low must be smaller")
        return self


class SweepSpec(Config):
    """Which fields are varied, and how."""

    method: Literal["grid", "random"] = "grid"
    over: tuple[dict[str, list[Any] | Range], ...]
    """Dotted fields and their values; several mappings are several grids one after another."""
    samples: PositiveInt | None = None
    """Members drawn, for `method: random`; each mapping of `over` is drawn from in turn."""
    seed: int = 0
    """Of what is drawn."""
    evaluate: bool = False
    """Evaluate every member too: `unmix train --sweep` then goes on to that stage."""
    colour: str = Field(default="coder.activation")
    """Field by which points of the plot are coloured."""

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("over"), dict):
            return {**tree, "over": [tree["over"]]}
        return tree

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.over or not all(self.over):
            raise ValueError("over: at least one field with values is needed")
        if (self.method == "random") != (self.samples is not None):
            raise ValueError("samples belongs to method: random, which needs it")
        for field, values in ((f, v) for grid in self.over for f, v in grid.items()):
            if isinstance(values, Range) and self.method == "grid":
                raise ValueError(f"over.{field}: a range needs method: random; a grid takes a list of values")
            if isinstance(values, list) and not values:
                raise ValueError(f"over.{field}: no values")
        return self

    def settings(self) -> list[dict[str, Any]]:
        """What each member sets, every one once, in a fixed order."""
        found: list[dict[str, Any]] = []
        if self.method == "grid":
            for grid in self.over:
                lists = [cast("list[Any]", values) for values in grid.values()]
                found += [dict(zip(grid, choice, strict=True)) for choice in itertools.product(*lists)]
        else:
            dice = random.Random(derive(self.seed, "sweep"))
            grids = itertools.islice(itertools.cycle(self.over), self.samples)
            found = [{field: _drawn(values, dice) for field, values in grid.items()} for grid in grids]
        unique: dict[str, dict[str, Any]] = {json.dumps(one, sort_keys=True): one for one in found}
        return list(unique.values())


def _drawn(values: list[Any] | Range, dice: random.Random) -> Any:
    if not isinstance(values, Range):
        return dice.choice(values)
    if not values.log:
        return round(dice.uniform(values.low, values.high), 12)
    return float(f"{values.low * (values.high / values.low) ** dice.random():.4g}")


@dataclass(frozen=True)
class Part:
    """Members of a sweep that make one run together."""

    config: RunConfig
    members: Mapping[str, dict[str, Any]]
    """What each coder of the run sets, by its name."""


def read_sweep(path: str | Path) -> SweepSpec:
    """The validated sweep file."""
    return build(SweepSpec, read_yaml(path), source=str(path))


def plan_sweep(spec: SweepSpec, tree: Mapping[str, Any], out: Path, source: str) -> list[Part]:
    """The runs of a sweep over the run file `tree`: one where only coder and training vary, else one a setting.

    `ConfigError` names the member that cannot be.
    """
    if tree.get("coders"):
        raise ConfigError(f"{source}: a sweep varies one coder; this run file has several")
    settings = spec.settings()
    names = member_names(settings)
    parts: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for name, setting in zip(names, settings, strict=True):
        shared = {field: value for field, value in setting.items() if not field.startswith(OWN)}
        key = json.dumps(shared, sort_keys=True)
        parts.setdefault(key, (shared, {}))[1][name] = setting
    found: list[Part] = []
    for shared, members in parts.values():
        base = _retiring(_set(tree, shared))
        folder = out if len(parts) == 1 else out / "runs" / member_names([shared, *[p[0] for p in parts.values()]])[0]
        coders = {name: _member(base, setting, f"{source}, member {name}") for name, setting in members.items()}
        whole = {**{key: value for key, value in base.items() if key != "coder"}, "coders": coders, "out": str(folder)}
        found.append(Part(build(RunConfig, whole, source=source), members))
    return found


def _retiring(tree: dict[str, Any]) -> dict[str, Any]:
    """The run file with `train.retire`, unless it says otherwise: one bad setting costs a sweep that member alone."""
    return {**tree, "train": {"retire": True, **(tree.get("train") or {})}}


def _member(base: Mapping[str, Any], setting: Mapping[str, Any], source: str) -> dict[str, Any]:
    own = {field: value for field, value in setting.items() if field.startswith(OWN)}
    tree = _set(base, own)
    changed = {field.removeprefix("train.") for field in own if field.startswith("train.")}
    train = tree.get("train") or {}
    build(OptimConfig, train, source=source)
    coder = {**(tree.get("coder") or {}), "train": {name: train[name] for name in train if name in _tops(changed)}}
    build(OneOfMany, coder, source=source)
    return coder


def _tops(fields: set[str]) -> set[str]:
    return {field.partition(".")[0] for field in fields}


def _set(tree: Mapping[str, Any], setting: Mapping[str, Any]) -> dict[str, Any]:
    return apply_overrides(tree, {field: json.dumps(value) for field, value in setting.items()})


def member_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """`topk-k32-seed1`: the values that vary, each once; a number stands behind the last word of its field."""
    fields = list(dict.fromkeys(field for setting in settings for field in setting))
    varied = [f for f in fields if len({json.dumps(s.get(f, "unset")) for s in settings}) > 1] or fields
    names: list[str] = []
    for setting in settings:
        words = [_word(field, setting[field]) for field in varied if field in setting]
        name = slug("-".join(words))[:80]
        if name in names:
            name += "-" + hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:6]
        names.append(name)
    return names


def _word(field: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value)
    last = field.rpartition(".")[2]
    return f"{last}_{text}" if last[-1].isdigit() else f"{last}{text}"
