"""One door for every place that a coder can be fetched from."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from unmix.core.errors import FormatError, did_you_mean
from unmix.formats.sources.base import Fetched

SCHEMES = {
    "hf": "unmix.formats.sources.hub",
    "wandb": "unmix.formats.sources.wandb",
    "https": "unmix.formats.sources.blob",
    "http": "unmix.formats.sources.blob",
    "release": "unmix.formats.sources.releases",
}
"""The module of each scheme, with a `fetch(text, *, below)`; imported on first use."""
FORMS = "a folder, a file, hf://owner/repo/path, release:NAME/ID, wandb://entity/project/name, https://host/file"


def scheme_of(text: str) -> str | None:
    """`hf` of `hf://…`, `release` of `release:…`; None for a local path. `FormatError` for an unknown scheme."""
    if text.startswith("release:"):
        return "release"
    scheme, found, _ = text.partition("://")
    if not found:
        return None
    if scheme not in SCHEMES:
        raise FormatError(f"{text}: unknown scheme {scheme!r}. {did_you_mean(scheme, SCHEMES)} A place is {FORMS}")
    return scheme


def is_remote(place: str | Path) -> bool:
    """Whether `place` names something that would have to be fetched. `FormatError` for an unknown scheme."""
    return isinstance(place, str) and scheme_of(place) is not None


def fetch(place: str | Path, *, below: bool = False) -> Fetched:
    """`place` on this machine: fetched into a cache where it lies elsewhere, as it is where it is a path.

    Only the one folder or file is fetched; with `below`, the folders under it too (for places that hold many coders).
    Raises `FormatError` (nothing there, not understood), `CorruptError` (not the published bytes), `ServiceError`
    (no answer and no copy in the cache) and `MachineError` (disk, missing extra).
    """
    scheme = scheme_of(place) if isinstance(place, str) else None
    if scheme is None:
        path = Path(place).expanduser()
        if not path.exists():
            raise FormatError(f"{place}: no such file or folder")
        return Fetched(path, {"scheme": "local", "place": str(place)})
    found: Callable[..., Fetched] = import_module(SCHEMES[scheme]).fetch
    return found(str(place), below=below)
