"""The door that every format comes through, and the list of those that are built in."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.plugins import Registry
from unmix.formats.place import Place

FORMATS = Registry(
    "unmix.formats",
    "format",
    {
        "native": "unmix.formats.native:NativeFormat",
        "sae_lens": "unmix.formats.sae_lens:SaeLensFormat",
    },
)


class Format(Protocol):
    """One published layout. One small file a format; adding one touches that file, its test and `FORMATS`."""

    name: str
    looks_for: str
    """What tells this layout from others, for messages."""
    writable: bool

    def recognise(self, place: Place) -> bool:
        """Whether the place holds this layout, by its files' names and content. Loads no weights, never raises."""
        ...

    def load(self, place: Place) -> SparseCoder:
        """The one coder of a recognised place, on the CPU in evaluation mode."""
        ...

    def write(self, coder: SparseCoder, folder: Path) -> None:
        """Write `coder` to a new folder; `FormatError` where this layout cannot say what the coder does."""
        ...


def format_of(name: str) -> Format:
    """The format called `name`; `ConfigError` naming the nearest where there is none."""
    made: Format = FORMATS.get(name)()
    return made
