"""A place that may hold coders: a folder, or one file of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import yaml

from unmix.core.errors import FormatError, UnmixError
from unmix.formats.stores import Header, Store, open_store

_SETTINGS_BYTES = 16 * 2**20
"""The largest config file that is parsed."""


class Place:
    """What the recognisers and readers look at. Naming one file of a coder's folder names that coder."""

    def __init__(self, path: str | Path, shown: str | None = None, origin: dict[str, Any] | None = None) -> None:
        """`shown` is how the user wrote the place, `origin` where it was fetched from. `FormatError`: nothing there."""
        path = Path(path).expanduser()
        self.shown = shown or str(path)
        if not path.exists():
            raise FormatError(f"{self.shown}: no such file or folder")
        self.file = None if path.is_dir() else path.name
        self.folder = path if path.is_dir() else path.parent
        self.origin = origin or {}
        self.problems: dict[str, str] = {}
        """Why a file could not be opened, by name: what recognisers met on their way."""
        self._stores: dict[str, Store] = {}

    @property
    def hints(self) -> str:
        """The place as text with `/`: layouts without a config say layer, width and site in their folders' names."""
        # A local folder is resolved, so that "." has names too; a fetched one is known by what was asked for, and one
        # of a release by where the release lies.
        asked = str(self.origin.get("source") or self.shown)
        written = (asked if "://" in asked else str(self.folder.resolve())).replace("\\", "/")
        return written + (f"/{self.file}" if self.file and not written.endswith(self.file) else "")

    def has(self, *names: str) -> bool:
        """Whether the folder holds all of `names`, and the file that was named, if any, is one of them."""
        return all((self.folder / name).is_file() for name in names) and (self.file is None or self.file in names)

    def glob(self, pattern: str) -> list[str]:
        """Names of the files right inside the folder that match, in order; of a named file, it alone where it does."""
        names = sorted(f.name for f in self.folder.glob(pattern) if f.is_file())
        return names if self.file is None else [name for name in names if name == self.file]

    def listing(self, n: int = 12) -> str:
        """The first files and folders, for messages."""
        names = sorted(f.name + ("/" if f.is_dir() else "") for f in self.folder.iterdir())
        return ", ".join([*names[:n], *(["…"] if len(names) > n else [])]) or "nothing"

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file whose top is an object; `FormatError` otherwise."""
        try:
            tree = json.loads(self._text(name))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise FormatError(f"{self.shown}: {name} is not JSON ({error})") from error
        return self._object(name, tree)

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML file whose top is a mapping; `FormatError` otherwise. Tags that would build objects are refused."""
        try:
            tree = yaml.safe_load(self._text(name))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise FormatError(f"{self.shown}: {name} is not plain YAML ({error})") from error
        return self._object(name, tree)

    def peek(self, name: str) -> dict[str, Any]:
        """As `json` or `yaml`, by the file's suffix; empty where it is missing or neither. For recognisers."""
        if not (self.folder / name).is_file():
            return {}
        try:
            return self.yaml(name) if name.endswith((".yaml", ".yml")) else self.json(name)
        except FormatError as error:
            self.problems[name] = str(error)
            return {}

    def store(self, name: str) -> Store:
        """The tensors of one file, opened once; `CorruptError` or `FormatError` where it is not a file of tensors."""
        if name not in self._stores:
            self._stores[name] = open_store(self.folder / name, f"{self.shown}: {name}")
        return self._stores[name]

    def keys(self, name: str) -> frozenset[str]:
        """Names of the tensors in a file; empty where it is missing or cannot be opened. For recognisers."""
        return frozenset(self.headers(name))

    def headers(self, name: str) -> dict[str, Header]:
        """Shapes and dtypes in a file; empty where it is missing or cannot be opened. For recognisers."""
        if not (self.folder / name).is_file():
            return {}
        try:
            return dict(self.store(name).headers())
        except UnmixError as error:
            self.problems[name] = str(error)
            return {}

    def _text(self, name: str) -> str:
        path = self.folder / name
        if path.is_file() and path.stat().st_size > _SETTINGS_BYTES:
            raise FormatError(f"{self.shown}: {name} has {path.stat().st_size} bytes, too large for a config")
        return path.read_text(encoding="utf-8")

    def _object(self, name: str, tree: Any) -> dict[str, Any]:
        if not isinstance(tree, dict):
            raise FormatError(f"{self.shown}: {name} holds a {type(tree).__name__}, expected an object")
        return cast("dict[str, Any]", tree)
