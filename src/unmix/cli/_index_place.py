"""Places of indexes on a command line: what is none is the user's error, and said as one."""

from __future__ import annotations

from pathlib import Path

from unmix.core.errors import ConfigError
from unmix.core.manifest import MANIFEST

INDEX = "index.json"


def refuse_index(out: str | Path) -> None:
    """`ConfigError` where a finished index stands at a place to write: it may hold hours of work."""
    if (Path(out) / INDEX).is_file():
        raise ConfigError(f"{out}: holds an index already; choose another folder, or remove it first")


def require_index(place: str | Path) -> Path:
    """The folder where an index is, broken or not; `ConfigError` where there is none, with what is there instead."""
    folder = Path(place)
    if (folder / INDEX).is_file():
        return folder
    if (folder.parent / f".{folder.name}.building").is_dir():
        raise ConfigError(f"{place}: is not finished; the unmix index command that began it goes on")
    if not folder.is_dir():
        what = "is a file, expected the folder of an index" if folder.exists() else "no such folder"
        raise ConfigError(f"{place}: {what}")
    if (folder / "index" / INDEX).is_file():
        raise ConfigError(f"{place}: is no index, but {folder / 'index'} is one")
    if (folder / MANIFEST).is_file():
        return folder  # of another kind, or broken: reading it says which
    raise ConfigError(f"{place}: holds no index")
