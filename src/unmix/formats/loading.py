"""Load any published coder: find the format by content, never by trying."""

from __future__ import annotations

from pathlib import Path

from unmix.coder.sparse_coder import SparseCoder
from unmix.core.errors import FormatError
from unmix.formats.hub import SCHEME, download
from unmix.formats.place import Place
from unmix.formats.registry import FORMATS, Format, format_of

_DEPTH = 3
"""How far below a folder `load_all` looks for coders."""


def resolve(place: str | Path) -> Place:
    """A local place behind a path or an `hf://owner/repo[@revision]/path` (which is downloaded)."""
    text = str(place)
    if text.startswith(SCHEME):
        return Place(download(text), shown=text)
    if "://" in text:
        raise FormatError(f"{text}: unknown scheme; allowed: a folder, a file, {SCHEME}owner/repo/path")
    return Place(place)


def recognised(place: Place) -> list[Format]:
    """Every format whose recogniser says yes."""
    return [f for f in (format_of(name) for name in FORMATS.names()) if f.recognise(place)]


def detect(place: str | Path) -> str:
    """The name of the one format that `place` is in.

    `FormatError` where none is (saying what was looked for and what was found), where several are (saying how
    to choose), or where the place holds several coders (listing them).
    """
    return detect_format(resolve(place)).name


def load(place: str | Path, format: str | None = None) -> SparseCoder:
    """The coder at `place`: a folder, a file, or `hf://owner/repo[@revision]/path`. On the CPU, evaluation mode.

    `format` names the layout where several fit; by default it is recognised by content. Raises `FormatError`
    (no such place, no or several formats, several coders, tensors or settings that do not fit), `CorruptError`,
    `NonFiniteError`, and `ServiceError` where the hub does not answer.
    """
    return _load(resolve(place), format)


def load_all(place: str | Path, format: str | None = None) -> dict[str, SparseCoder]:
    """Every coder at or below `place`, by its path from there (or its own name where the place itself is one)."""
    there = resolve(place)
    if format is not None or recognised(there):
        coder = _load(there, format)
        return {coder.name: coder}
    names = _coders_below(there)
    if not names:
        raise _nothing(there)
    return {name: _load(Place(there.folder / name, f"{there.shown}/{name}"), None) for name in names}


def convert(src: str | Path, dst: str | Path, format: str) -> SparseCoder:
    """Load `src` and write it to the new folder `dst` in `format`; returns what was loaded.

    `FormatError` where the format cannot be written or cannot express the coder, or `dst` holds anything.
    """
    target = format_of(format)
    folder = Path(dst).expanduser()
    if not target.writable:
        raise FormatError(f"the format {format!r} can be read but not written")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FormatError(f"{dst}: there is something here already; name a new folder")
    coder = load(src)
    target.write(coder, folder)
    return coder


def _load(place: Place, format: str | None) -> SparseCoder:
    if format is None:
        return detect_format(place).load(place)
    chosen = format_of(format)
    if not chosen.recognise(place):
        raise FormatError(f"{place.shown}: not {format}: looked for {chosen.looks_for}; found {place.listing()}")
    return chosen.load(place)


def detect_format(place: Place) -> Format:
    """As `detect`, of a resolved place."""
    found = recognised(place)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f.name for f in found)
        raise FormatError(f"{place.shown}: may be {names}; choose with format={found[0].name!r} (or another of these)")
    below = _coders_below(place)
    if below:
        raise FormatError(
            f"{place.shown}: holds {len(below)} coders: {', '.join(below)}; name one of these, or use load_all"
        )
    raise _nothing(place)


def _nothing(place: Place) -> FormatError:
    wanted = "; ".join(f"{f.name} ({f.looks_for})" for f in map(format_of, FORMATS.names()))
    return FormatError(f"{place.shown}: no known format. Looked for: {wanted}. Found: {place.listing()}")


def _coders_below(place: Place) -> list[str]:
    """Paths, from the place, of the folders below that hold a coder; hidden ones are left out."""
    if place.file is not None:
        return []
    found: list[str] = []
    level = [place.folder]
    for _ in range(_DEPTH):
        folders = [f for parent in level for f in sorted(parent.iterdir()) if _is_open_folder(f)]
        hits = [f for f in folders if recognised(Place(f))]
        found += [f.relative_to(place.folder).as_posix() for f in hits]
        level = [f for f in folders if f not in hits]
    return found


def _is_open_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")
