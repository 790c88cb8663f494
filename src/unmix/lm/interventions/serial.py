"""Interventions as JSON: a list of objects, each with `do` and its fields; what it does not know it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from unmix.core.errors import ConfigError, did_you_mean
from unmix.lm.interventions.acts import Ablate, Add, Clamp, Intervention, LatentIntervention, Multiply, Set
from unmix.lm.interventions.places import Fires
from unmix.lm.interventions.steering import Steer

KINDS: dict[str, type[Intervention]] = {
    "set": Set, "add": Add, "multiply": Multiply, "ablate": Ablate, "clamp": Clamp, "steer": Steer,
}  # fmt: skip


def interventions_to_json(interventions: Sequence[Intervention], indent: int | None = None) -> str:
    """A JSON list, in order. Fields that have their default are left out; vectors are lists of numbers."""
    return json.dumps([_plain(act) for act in interventions], indent=indent, allow_nan=False)


def interventions_from_json(text: str | Sequence[Mapping[str, Any]]) -> list[Intervention]:
    """The interventions of a JSON text, or of the list in it.

    `ConfigError`, saying which entry, for text that is not JSON, unknown kinds or fields, and values out of place.
    """
    tree: Any = text
    if isinstance(text, str):
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"interventions: not JSON: {error}") from None
    if not isinstance(tree, (list, tuple)):
        raise ConfigError(f"interventions: expected a list of objects, found {type(tree).__name__}")
    return [_read(entry, f"interventions[{i}]") for i, entry in enumerate(cast("list[Any]", tree))]


def _plain(act: Intervention) -> dict[str, Any]:
    names = {cls: name for name, cls in KINDS.items()}
    if type(act) not in names:
        raise ConfigError(f"{type(act).__name__} has no JSON form; these have: {', '.join(KINDS)}")
    return {"do": names[type(act)], **_fields(act)}


def _fields(item: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        # A tensor has no truth value to compare a default by.
        if not isinstance(value, Tensor) and value == field.default:
            continue
        if isinstance(value, Tensor):
            value = value.detach().cpu().tolist()
        elif isinstance(value, Fires):
            value = {"fires": _fields(value)}
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def _read(entry: Any, place: str) -> Intervention:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{place}: expected an object, found {type(entry).__name__}")
    fields = dict(cast("Mapping[str, Any]", entry))
    kind = fields.pop("do", None)
    if not isinstance(kind, str) or kind not in KINDS:
        shown = "nothing" if kind is None else repr(kind)
        raise ConfigError(f"{place}: do is {shown}. {did_you_mean(str(kind), KINDS)}")
    where = fields.get("where")
    if isinstance(where, Mapping):
        fields["where"] = _fires(cast("Mapping[str, Any]", where), f"{place}.where")
    return _make(KINDS[kind], fields, place)


def _fires(entry: Mapping[str, Any], place: str) -> Fires:
    if set(entry) != {"fires"} or not isinstance(entry["fires"], Mapping):
        raise ConfigError(f'{place}: expected {{"fires": {{…}}}}, found keys {", ".join(map(str, entry)) or "none"}')
    return _make(Fires, dict(cast("Mapping[str, Any]", entry["fires"])), f"{place}.fires")


def _make(cls: type[Any], fields: dict[str, Any], place: str) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"{place}: unknown field {name!r}. {did_you_mean(name, known)}")
        _check_type(cls, name, value, place)
    needed = [
        f.name for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    missing = [name for name in needed if name not in fields]
    if missing:
        raise ConfigError(f"{place}: {missing[0]} is missing")
    try:
        return cls(**fields)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


_WORDS = ("coder", "hook", "units")
_MAY_BE_NONE = (*_WORDS, "minimum", "maximum", "vector")


def _check_type(cls: type[Any], name: str, value: Any, place: str) -> None:
    """`ConfigError` where a field has another JSON type than its own."""
    several = isinstance(value, list)
    many = cast("list[Any]", value) if several else [value]
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in many)
    whole = numbers and all(isinstance(one, int) for one in many)
    if name in _WORDS:
        fine, expected = isinstance(value, str), "text"
    elif name == "evict":
        fine, expected = isinstance(value, bool), "true or false"
    elif name == "latent":
        one = not issubclass(cls, LatentIntervention)
        fine, expected = whole and not (one and several), "a whole number" if one else "whole numbers"
        fine = fine or (value is None and cls is Steer)
    elif name in ("where", "within"):
        fine, expected = isinstance(value, (str, Fires)) or (several and whole), "a word or positions"
    elif name == "to":
        fine, expected = isinstance(value, str) or numbers, "zero, mean or numbers"
    elif name in ("scale", "above"):
        fine, expected = numbers and not several, "a number"
    elif name == "vector":
        fine, expected = numbers and several, "a list of numbers"
    else:
        fine, expected = numbers, "numbers"
    if not fine and not (value is None and name in _MAY_BE_NONE):
        raise ConfigError(f"{place}: {name} is {value!r}; expected {expected}")
