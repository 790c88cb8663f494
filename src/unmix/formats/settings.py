"""A foreign config, read key by key: what was used, what was knowingly ignored, and what nobody understood."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, cast

from unmix.core.errors import FormatError, did_you_mean
from unmix.formats.place import Place

log = logging.getLogger("unmix")

_MISSING: Any = object()


class Settings:
    """Typed reading of one config. Every complaint names the file, the key, what was found and what is allowed."""

    def __init__(self, place: Place, file: str, tree: Mapping[str, Any], path: str = "") -> None:
        self.place, self.file, self.tree = place, file, dict(tree)
        self._path = path
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.tree

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands."""
        self._read.add(key)
        return self.tree.get(key, default)

    def size(self, key: str, default: int | None = _MISSING) -> int:
        """A whole number above 0. Some peers write it as 16.0."""
        value = self._value(key, default)
        if not _is_number(value) or value != int(value) or value < 1:
            raise self.wrong(key, value, "a whole number above 0")
        return int(value)

    def number(self, key: str, default: float = _MISSING, above: float = -math.inf) -> float:
        """A finite number larger than `above`."""
        value = self._value(key, default)
        if not _is_number(value) or not value > above:
            raise self.wrong(key, value, "a number" if above == -math.inf else f"a number above {above:g}")
        return float(value)

    def flag(self, key: str, default: bool = _MISSING) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str = _MISSING) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def choice(self, key: str, *allowed: str, default: str = _MISSING) -> str:
        """One of some words."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, f"one of {', '.join(allowed)}")
        if value not in allowed:
            raise self.error(f"{self._path}{key} is {value!r}. {did_you_mean(value, allowed)}")
        return value

    def object(self, key: str) -> Settings:
        """The settings below `key`; empty where it is missing or null."""
        value = self.raw(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Settings(self.place, self.file, cast("dict[str, Any]", value), f"{self._path}{key}.")

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing in what the weights compute."""
        self._read.update(keys)

    def unread(self) -> list[str]:
        """Keys that were neither used nor ignored."""
        return sorted(set(self.tree) - self._read)

    def warn_unread(self) -> None:
        """Say which keys nobody understood; they are kept with the coder all the same."""
        if self.unread():
            names = ", ".join(self._path + key for key in self.unread())
            log.warning("%s: %s: keys kept but not understood: %s", self.place.shown, self.file, names)

    def error(self, message: str) -> FormatError:
        """A `FormatError` that says where."""
        return FormatError(f"{self.place.shown}: {self.file}: {message}")

    def wrong(self, key: str, value: Any, expected: str) -> FormatError:
        """The error for a value that is not what it should be."""
        found = "missing" if value is _MISSING else f"{json.dumps(value, default=str)[:200]}"
        return self.error(f"{self._path}{key} is {found}, expected {expected}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw(key, default)
        # A null stands for "not said" in every peer's configs.
        return default if value is None and default is not _MISSING else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
