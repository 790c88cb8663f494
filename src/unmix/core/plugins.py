"""Lazy registries: the built-in parts and other people's plugins come through the same door.

A registry maps a name to `"module:attribute"`; nothing is imported until it is asked for.
Packages add to a registry with an entry point in the group of its name (`unmix.scorers`, …).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from unmix.core.errors import ConfigError, did_you_mean


class Registry:
    """Names of one kind of part, each resolved on first use."""

    def __init__(self, group: str, noun: str, builtin: Mapping[str, str]) -> None:
        self.group = group
        self.noun = noun
        self._builtin = dict(builtin)

    def names(self) -> list[str]:
        """Built-in names first, then plugins', each once."""
        plugins = [entry.name for entry in entry_points(group=self.group)]
        return list(dict.fromkeys([*self._builtin, *plugins]))

    def get(self, name: str) -> Any:
        """The object behind `name`; `ConfigError` with the nearest names where there is none."""
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for entry in entry_points(group=self.group):
            if entry.name == name:
                return entry.load()
        raise ConfigError(f"unknown {self.noun} {name!r}. {did_you_mean(name, self.names())}")
