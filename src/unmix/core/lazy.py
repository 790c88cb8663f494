"""Exports that are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(names: Mapping[str, str]) -> Callable[[str, str], Any]:
    """For a package's `__getattr__`: resolve `name` in the module that `names` gives, else `AttributeError`."""

    def resolve(package: str, name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(names[name]), name)

    return resolve
