"""A place that may hold a coder: a folder, or one file of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unmix.core.errors import CorruptError, FormatError


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a stored tensor, read without its data; dtype as safetensors writes it (`F32`)."""

    shape: tuple[int, ...]
    dtype: str


class Place:
    """What the recognisers and loaders look at. Naming one file of a coder's folder names that coder."""

    def __init__(self, path: str | Path, shown: str | None = None) -> None:
        """`shown` is how the user wrote the place. `FormatError` where nothing is there."""
        path = Path(path).expanduser()
        self.shown = shown or str(path)
        if not path.exists():
            raise FormatError(f"{self.shown}: no such file or folder")
        self.file = None if path.is_dir() else path.name
        self.folder = path if path.is_dir() else path.parent

    def has(self, *names: str) -> bool:
        """Whether the folder holds all of `names`, and the file that was named, if any, is one of them."""
        return all((self.folder / name).is_file() for name in names) and (self.file is None or self.file in names)

    def listing(self, n: int = 12) -> str:
        """The first files and folders, for messages."""
        names = sorted(f.name + ("/" if f.is_dir() else "") for f in self.folder.iterdir())
        return ", ".join([*names[:n], *(["…"] if len(names) > n else [])]) or "nothing"

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file whose top is an object; `FormatError` otherwise."""
        try:
            tree = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FormatError(f"{self.shown}: {name} is not JSON ({error})") from error
        if not isinstance(tree, dict):
            raise FormatError(f"{self.shown}: {name} holds a {type(tree).__name__}, expected an object")
        return cast("dict[str, Any]", tree)

    def headers(self, name: str) -> dict[str, Header]:
        """Shapes and dtypes in a safetensors file; `CorruptError` where it is cut short or not one."""
        try:
            with safe_open(self.folder / name, framework="pt") as handle:
                slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
                return {key: Header(tuple(s.get_shape()), str(s.get_dtype())) for key, s in slices.items()}
        except (OSError, SafetensorError) as error:
            raise CorruptError(f"{self.shown}: {name} cannot be read ({error})") from error

    def tensors(self, name: str, keys: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors of a safetensors file, on the CPU; `CorruptError` as `headers`."""
        try:
            with safe_open(self.folder / name, framework="pt") as handle:
                return {key: handle.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise CorruptError(f"{self.shown}: {name} cannot be read ({error})") from error
