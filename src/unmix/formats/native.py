"""The native folder, as one format among the others. Reading and writing live in `unmix.coder.native`."""

from __future__ import annotations

from pathlib import Path

from unmix.coder.native import CONFIG, WEIGHTS, load_native, save_native
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.manifest import MANIFEST
from unmix.formats.place import Place


class NativeFormat:
    """`config.json` + `coder.safetensors` + `manifest.json`."""

    name = "native"
    looks_for = f"{CONFIG} + {WEIGHTS}"
    writable = True

    def recognise(self, place: Place) -> bool:
        """By its files; `coder.safetensors` is a name of our own."""
        both = (place.folder / CONFIG).is_file() and (place.folder / WEIGHTS).is_file()
        return both and place.file in (None, CONFIG, WEIGHTS, MANIFEST)

    def load(self, place: Place) -> SparseCoder:
        """See `load_native`."""
        return load_native(place.folder)

    def write(self, coder: SparseCoder, folder: Path) -> None:
        """See `save_native`."""
        save_native(coder, folder)
