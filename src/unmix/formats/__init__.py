"""Published layouts of sparse coders: recognise, read, write, convert. Knows coders, no language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.formats.inspection import inspect
    from unmix.formats.loading import convert, detect, load, load_all
    from unmix.formats.registry import FORMATS

__all__ = ["FORMATS", "convert", "detect", "inspect", "load", "load_all"]

_exports = lazy_exports(
    {
        "FORMATS": "unmix.formats.registry",
        "convert": "unmix.formats.loading",
        "detect": "unmix.formats.loading",
        "inspect": "unmix.formats.inspection",
        "load": "unmix.formats.loading",
        "load_all": "unmix.formats.loading",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
