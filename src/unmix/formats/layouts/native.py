"""The native folders, through the same door as everybody else's. The layout itself lives in `unmix.coder`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unmix.coder.coder_set import KIND as SET_KIND
from unmix.coder.hashing import coder_hash
from unmix.coder.native import CONFIG, FORMAT, KIND, STATISTICS, WEIGHTS, load_native, write_config
from unmix.core.errors import FormatError
from unmix.core.manifest import MANIFEST, require_whole, write_manifest
from unmix.formats.draft import Draft
from unmix.formats.lazy import Lazy
from unmix.formats.place import Place
from unmix.formats.registry import Format
from unmix.formats.stores import open_store
from unmix.formats.stores.writing import write_safetensors


class NativeFormat(Format):
    """`config.json` with the field `format`, and `coder.safetensors`."""

    name = "native"
    looks_for = f"{CONFIG} + {WEIGHTS}"
    writable = True

    def recognise(self, place: Place) -> bool:
        """By its two files."""
        named = place.file in (None, CONFIG, WEIGHTS, MANIFEST, STATISTICS)
        return named and (place.folder / CONFIG).is_file() and (place.folder / WEIGHTS).is_file()

    def read(self, place: Place, name: str = "") -> Draft:
        """The coder, its files checked against their hashes."""
        coder = load_native(place.folder)
        state = {name: Lazy.of(t) for name, t in coder.state_dict().items()}
        return Draft(coder.config, state, {name: Lazy.of(t) for name, t in coder.statistics.items()})

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """Config, weights, statistics, manifest; one tensor in memory at a time."""
        (draft,) = drafts.values()
        write_config(draft.config, folder)
        write_safetensors(folder / WEIGHTS, draft.state, metadata={"format": FORMAT})
        if draft.statistics:
            write_safetensors(folder / STATISTICS, draft.statistics)
        # Hashed from the file, which is mapped: one tensor at a time.
        written = open_store(folder / WEIGHTS, WEIGHTS)
        digest = coder_hash(draft.config, ((name, written.tensor(name)) for name in sorted(draft.state)))
        write_manifest(folder, KIND, coder_hash=digest)


class NativeSetFormat(Format):
    """A manifest that lists the coders of a `CoderSet`, one native folder each."""

    name = "native_set"
    looks_for = f"{MANIFEST} of kind {SET_KIND!r}"
    writable = True
    many = True

    def recognise(self, place: Place) -> bool:
        """By the manifest's kind."""
        return place.file in (None, MANIFEST) and place.peek(MANIFEST).get("kind") == SET_KIND

    def coders(self, place: Place) -> tuple[str, ...]:
        """As the manifest lists them."""
        names = require_whole(place.folder, SET_KIND).get("coders")
        if not isinstance(names, list) or not names or any(Path(str(n)).name != n for n in names):
            raise FormatError(f"{place.shown}: {MANIFEST}: coders is {names!r}, expected names of folders")
        return tuple(str(n) for n in names)

    def joint(self, place: Place) -> bool:
        """Always: that is what a set is."""
        return True

    def read(self, place: Place, name: str = "") -> Draft:
        """One coder of the set."""
        return NativeFormat().read(Place(place.folder / name, f"{place.shown}/{name}"))

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """One native folder each, then the manifest."""
        for name, draft in drafts.items():
            (folder / name).mkdir()
            NativeFormat().write({name: draft}, folder / name)
        write_manifest(folder, SET_KIND, coders=list(drafts))
