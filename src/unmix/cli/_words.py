"""Words and options of a command line, checked; coders of a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from unmix.core.config import parse_count
from unmix.core.errors import ConfigError, did_you_mean


@dataclass
class Words:
    """A command line, read: what stands by itself, options with one value each, and those that may come again."""

    words: list[str] = field(default_factory=lambda: [])
    options: dict[str, str] = field(default_factory=lambda: {})
    again: list[tuple[str, str]] = field(default_factory=lambda: [])
    """Options that may be said several times, in order."""

    def get(self, name: str, default: str | None = None) -> str | None:
        """An option's text."""
        return self.options.get(name, default)

    @overload
    def whole(self, name: str, default: int) -> int: ...

    @overload
    def whole(self, name: str, default: None = None) -> int | None: ...

    def whole(self, name: str, default: int | None = None) -> int | None:
        """An option as a whole number, 8k and 1M too; `ConfigError` where it is none."""
        if name not in self.options:
            return default
        text = self.options[name]
        found = (
            -parse_count(text[1:]) if text[:1] == "-" and isinstance(parse_count(text[1:]), int) else parse_count(text)
        )
        if not isinstance(found, int):
            raise ConfigError(f"--{name} {text}: expected a whole number")
        return found

    @overload
    def number(self, name: str, default: float) -> float: ...

    @overload
    def number(self, name: str, default: None = None) -> float | None: ...

    def number(self, name: str, default: float | None = None) -> float | None:
        """An option as a number; `ConfigError` where it is none."""
        if name not in self.options:
            return default
        try:
            return float(self.options[name])
        except ValueError:
            raise ConfigError(f"--{name} {self.options[name]}: expected a number") from None


def read_words(
    arguments: Sequence[str],
    allowed: Sequence[str],
    command: str,
    expected: Sequence[str],
    again: Sequence[str] = (),
) -> Words:
    """Words as many as `expected` names, options of `allowed`, and of `again` any number; `ConfigError` otherwise.

    A value may begin with one dash (`--position -1`), not with two.
    """
    found, rest = Words(), list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            found.words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name not in (*again, *allowed):
            raise ConfigError(f"unknown option --{name}. {did_you_mean(name, (*again, *allowed))}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value; see unmix {command.split()[0]} --help")
            value = rest.pop(0)
        if name in again:
            found.again.append((name, value))
        else:
            found.options[name] = value
    if found.words and not expected:
        name = command.split()[0]
        raise ConfigError(f"{command} takes options alone here, found {found.words[0]!r}; unmix {name} --help")
    if len(found.words) != len(expected):
        raise ConfigError(
            f"{command} takes {' '.join(expected)}, found {len(found.words)} words; quote what has spaces"
        )
    return found


def coders_of(place: str, format: str | None, names: str | None) -> Any:
    """Every coder of a place, or those that `names` (commas) names; coders that write together come as a set."""
    from unmix.formats import load_all

    coders = load_all(place, format)
    if names is None:
        return coders
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in coders:
            raise ConfigError(f"{place}: no coder {name!r} here. {did_you_mean(name, coders)}")
    return {name: coders[name] for name in chosen}
