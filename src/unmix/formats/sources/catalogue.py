"""The catalogue of published coders: patterns in `formats/releases.yaml`, and in a file of the user's own.

A release is a family of coders of one model in one place. Its patterns say how an ID becomes a source, so that four
lines stand for hundreds of coders. `$UNMIX_RELEASES` names a further file of the same shape; its names win.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from unmix.core.config import Config, build, read_yaml
from unmix.core.errors import ConfigError

BUILT_IN = Path(__file__).parent.parent / "releases.yaml"
ENVIRONMENT = "UNMIX_RELEASES"
ANY = "*"
_VARIABLE = re.compile(r"\{(\w+)\}")
_RANGE = re.compile(r"^(\d+)-(\d+)$")

Scalar = str | int | float | bool


def _spread(value: Any) -> Any:
    """`0-3` → 0, 1, 2, 3; `00-03` keeps its width; a list becomes words; one value a list of one."""
    if isinstance(value, str) and (match := _RANGE.match(value)):
        width = len(match[1]) if match[1].startswith("0") and len(match[1]) > 1 else 0
        return tuple(str(n).zfill(width) for n in range(int(match[1]), int(match[2]) + 1))
    if isinstance(value, (str, int)):
        return (str(value),)
    return tuple(str(v) for v in cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else value


def _spread_scalars(value: Any) -> Any:
    return _spread(value) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_spread)]
Run = Annotated[tuple[Scalar | None, ...], Field(min_length=1), BeforeValidator(_spread_scalars)]


class Pattern(Config):
    """How the IDs of some coders of a release become sources. `{name}` stands for a variable's value."""

    id: str
    source: str
    """`hf://…`, `wandb://…` or `https://…`."""
    values: dict[str, Words] = {}
    """What each variable may be: a list, a range `0-25`, or `*` for names that are listed at the source itself."""
    along: dict[str, Run] = {}
    """Further variables or facts, one for each value of the first variable; null where it is not known."""
    canonical: dict[str, Run] = {}
    """For each value of `width`, the `*` variable that the short ID `…/canonical` stands for, by the first variable."""
    absent: tuple[str, ...] = ()
    """IDs that the pattern makes and that were never published."""
    hook: str = ""
    """What the coder reads, where the files do not say it or it is known beforehand."""
    writes: str = ""
    """What it writes, where that is another hook."""
    facts: dict[str, Scalar] = {}
    """What was published on these coders: width, l0, fvu, …"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = set(self.values) | set(self.along)
        if _VARIABLE.search(self.source) is None and self.values:
            raise ValueError(f"{self.id}: the source has no variable, but values has {', '.join(self.values)}")
        for label, text in (("id", self.id), ("source", self.source), ("hook", self.hook), ("writes", self.writes)):
            strange = [v for v in _VARIABLE.findall(text) if v not in known]
            if strange:
                raise ValueError(f"{self.id}: {label} names {{{strange[0]}}}, which neither values nor along has")
        missing = [v for v in self.values if f"{{{v}}}" not in self.id]
        if missing:
            raise ValueError(f"{self.id}: the variable {missing[0]!r} is not part of the id")
        self._check_lengths()
        self._check_open()
        return self

    def _check_lengths(self) -> None:
        first = next(iter(self.values.values()), ())
        for name, run in [*self.along.items(), *self.canonical.items()]:
            if len(run) != len(first):
                raise ValueError(f"{self.id}: {name} has {len(run)} entries, expected {len(first)}")

    def _check_open(self) -> None:
        if len([v for v in self.values.values() if v == (ANY,)]) > 1:
            raise ValueError(f"{self.id}: only one variable may be '*'")
        open_ = self.open
        if open_ is None:
            if self.canonical:
                raise ValueError(f"{self.id}: canonical needs a variable that is '*'")
            return
        mark = f"{{{open_}}}"
        if mark in self.id.rpartition("/")[0] or mark in self.source.rpartition("/")[0]:
            raise ValueError(
                f"{self.id}: the variable {open_!r} is '*', so it must stand in the last part of id and source"
            )
        if mark not in self.source or not self.source.startswith("hf://"):
            raise ValueError(f"{self.id}: '*' needs an hf:// source, whose folders can be listed")
        if "/" in self.id and self.id.rpartition("/")[2] != self.source.rpartition("/")[2]:
            raise ValueError(f"{self.id}: with a variable that is '*', id and source must end in the same part")
        if self.canonical and "width" not in self.values:
            raise ValueError(f"{self.id}: canonical is by width, which is no variable here")

    @property
    def open(self) -> str | None:
        """The variable that is listed at the source, if any."""
        return next((name for name, words in self.values.items() if words == (ANY,)), None)

    def bindings(self) -> Iterator[dict[str, str]]:
        """Every combination of values, with what runs along; the open variable stays `*`. Those without a source go."""
        names = list(self.values)
        for combination in itertools.product(*self.values.values()):
            bound = dict(zip(names, combination))
            runs = self.running(bound)
            if all(runs.get(v) is not None for v in _VARIABLE.findall(self.source) if v in self.along):
                yield {**bound, **{k: str(v) for k, v in runs.items() if v is not None}}

    def running(self, bound: Mapping[str, str]) -> dict[str, Scalar | None]:
        """What runs along with the first variable, for its value in `bound`."""
        if not self.along:
            return {}
        name, words = next(iter(self.values.items()))
        index = words.index(bound[name])
        return {key: run[index] for key, run in self.along.items()}

    def ids(self) -> list[str]:
        """Every ID, `*` in place of what only the source can list, and the canonical ones."""
        found = [name for bound in self.bindings() if (name := fill(self.id, bound)) not in self.absent]
        for width, run in self.canonical.items():
            first = next(iter(self.values))
            for word, value in zip(self.values[first], run):
                if value is not None:
                    found.append(fill(f"{self.id.rpartition('/')[0]}/canonical", {first: word, "width": width}))
        return found


class Entry(Config):
    """One release."""

    name: str = Field(pattern=r"^[\w.-]+$")
    also: tuple[str, ...] = ()
    """Other names of the same release, such as those that other libraries give it."""
    model: str
    """The language model, by its name on the hub."""
    format: str
    """The layout of the files, as `load` would find it by itself."""
    licence: str | None = None
    url: str | None = None
    """Where it is described."""
    note: str = ""
    coders: tuple[Pattern, ...] = Field(min_length=1)

    def ids(self) -> list[str]:
        """Every ID of the release."""
        return [name for pattern in self.coders for name in pattern.ids()]


@dataclass(frozen=True)
class Catalogue:
    """All releases, by name."""

    entries: dict[str, Entry]

    def find(self, name: str) -> Entry | None:
        """The release of that name, or of that other name."""
        return self.entries.get(name) or next((e for e in self.entries.values() if name in e.also), None)

    def names(self) -> list[str]:
        """Names and other names."""
        return [*self.entries, *(other for e in self.entries.values() for other in e.also)]


def fill(template: str, bound: Mapping[str, object]) -> str:
    """`{name}` replaced by its value; what has none stays."""
    return _VARIABLE.sub(lambda match: str(bound.get(match[1], match[0])), template)


def read_catalogue(path: str | Path) -> list[Entry]:
    """The releases in a file. `ConfigError` naming the release and the field where it is not right."""
    tree = read_yaml(path)
    if tree.get("version") != 1:
        raise ConfigError(f"{path}: version must be 1, found {tree.get('version')!r}")
    # `shared` is for YAML anchors: rows that several releases refer to.
    unknown = set(tree) - {"version", "shared", "releases"}
    if unknown or not isinstance(tree.get("releases"), list):
        raise ConfigError(f"{path}: expected the fields version, releases (a list) and, for anchors, shared")
    entries: list[Entry] = []
    for raw in cast("list[Any]", tree["releases"]):
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: a release is a mapping of fields, found {raw!r}")
        entries += [build(Entry, one, f"{path}: {one.get('name', raw)}") for one in expand(raw, str(path))]
    names = [name for e in entries for name in (e.name, *e.also)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: {twice[0]!r} is named twice")
    return entries


def expand(raw: Mapping[str, Any], source: str) -> Iterator[dict[str, Any]]:
    """One release for each combination of the rows under `each`; `<name>` in any text is that row's value."""
    groups = raw.get("each")
    if groups is None:
        yield dict(raw)
        return
    lists = groups if groups and isinstance(groups[0], list) else [groups]
    if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in lists):
        raise ConfigError(f"{source}: each holds rows of values, or several lists of rows to combine")
    for rows in itertools.product(*lists):
        values = {key: value for row in rows for key, value in cast("dict[str, Any]", row).items()}
        yield {key: _put(value, values) for key, value in raw.items() if key != "each"}


def _put(node: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        return {str(_put(k, values)): _put(v, values) for k, v in cast("dict[Any, Any]", node).items()}
    if isinstance(node, list):
        return [_put(v, values) for v in cast("list[Any]", node)]
    if not isinstance(node, str):
        return node
    whole = re.fullmatch(r"<(\w+)>", node)
    if whole and whole[1] in values:
        return values[whole[1]]
    return re.sub(r"<(\w+)>", lambda match: str(values.get(match[1], match[0])), node)


@cache
def _read_once(path: str, changed: int) -> tuple[Entry, ...]:
    return tuple(read_catalogue(path))


def catalogue(file: str | Path | None = None) -> Catalogue:
    """The built-in releases, those of `$UNMIX_RELEASES`, and those of `file`; later ones win."""
    paths = [BUILT_IN, *(Path(p).expanduser() for p in (os.environ.get(ENVIRONMENT), file) if p)]
    entries: dict[str, Entry] = {}
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file of releases")
        entries |= {e.name: e for e in _read_once(str(path), path.stat().st_mtime_ns)}
    return Catalogue(entries)
