"""Which installed packages the built-in corpus reads: the interpreter's library and `unmix`'s own dependencies.

The list follows the requirements that `unmix` declares, without extras, so that tools installed beside it (test
runners, notebooks, …) do not change the text.
"""

from __future__ import annotations

import os
import platform
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

CORE = (
    "torch",
    "transformers",
    "interp-engine",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pydantic",
    "rich",
    "httpx",
    "PyYAML",
    "jaxtyping",
    "gguf",
    "packaging",
)
"""`unmix`'s own requirements, for a checkout that is on the path but not installed."""

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_vendor", "vendor", "site-packages", "dist-packages", "__pycache__"}
    | {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
)


@dataclass(frozen=True)
class Distribution:
    """One package: its Python source files, by their path inside it."""

    name: str
    version: str
    files: dict[str, Path]


def core_distributions() -> list[Distribution]:
    """The standard library first, then each installed package of the requirement tree, by name."""
    return [standard_library(), *_packages()]


def standard_library() -> Distribution:
    """The interpreter's own modules; without tests, demonstrations and installed packages."""
    top = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder) / name
                files[path.relative_to(top).as_posix()] = path
    return Distribution("python", platform.python_version(), files)


def requirement_tree(roots: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Every installed distribution that `roots` need, directly or not, by normalised name; no extras."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(roots)
    while waiting:
        name = normalise(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        waiting.extend(_required(found[name].requires))
    return found


def normalise(name: str) -> str:
    """The canonical spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _packages() -> list[Distribution]:
    try:
        roots = _required(metadata.requires("unmix"))
    except metadata.PackageNotFoundError:
        roots = list(CORE)
    tree = requirement_tree(roots)
    return [Distribution(name, tree[name].version, _source_files(tree[name])) for name in sorted(tree)]


def _required(lines: Iterable[str] | None) -> list[str]:
    """The names in requirement lines whose markers hold here with no extra chosen."""
    parsed = [Requirement(line) for line in lines or ()]
    return [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _source_files(distribution: metadata.Distribution) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for entry in distribution.files or ():
        if entry.suffix == ".py" and _SKIPPED_FOLDERS.isdisjoint(entry.parts[:-1]):
            files[entry.as_posix()] = Path(str(entry.locate()))
    return files
