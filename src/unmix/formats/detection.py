"""Which format a place is in: by content, each recogniser asked once, and never by trying to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unmix.core.errors import FormatError
from unmix.formats.place import Place
from unmix.formats.registry import FORMATS, Format, format_of

TENSORS = ("*.safetensors", "*.safetensors.index.json", "*.npz", "*.pt", "*.pth", "*.bin", "*.pkl", "*.pkl.gz")
"""Names that files of tensors go by."""
_DEPTH = 6
"""How far below a folder coders are looked for."""
_OPENED = 4
"""Files that are opened to say why a place cannot be read."""


def recognised(place: Place) -> list[Format]:
    """Every format whose recogniser says yes."""
    return [f for f in (format_of(name) for name in FORMATS.names()) if f.recognise(place)]


def choose_format(place: Place, format: str | None) -> Format:
    """The format called `format`, or the one that the place is in; `FormatError` as `detect`."""
    if format is not None:
        chosen = format_of(format)
        if not chosen.recognise(place):
            raise FormatError(
                f"{place.shown}: not {format}: looked for {chosen.looks_for}; found {place.listing()}{_problems(place)}"
            )
        return chosen
    found = recognised(place)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f.name for f in found)
        raise FormatError(f"{place.shown}: may be {names}; choose with format={found[0].name!r} (or another of these)")
    names = below(place)
    if len(names) == 1:
        raise FormatError(f"{place.shown}: holds no coder itself; name the one below it: {place.shown}/{names[0]}")
    if names:
        raise FormatError(
            f"{place.shown}: holds {len(names)} coders: {names_in(names)}; name one of these, or use load_all"
        )
    raise nothing(place)


def nothing(place: Place) -> FormatError:
    """The error for a place that no format recognises."""
    for name in [name for pattern in TENSORS for name in place.glob(pattern)][:_OPENED]:
        place.headers(name)
    if place.problems:
        # A file that cannot be opened is the reason; the list of layouts would bury it.
        return FormatError(f"{place.shown}: no known format{_problems(place)}")
    return FormatError(
        f"{place.shown}: no known format. Found: {place.listing()}. Known formats: {', '.join(FORMATS.names())}; "
        "docs/formats.md says which files each is made of"
    )


def below(place: Place) -> list[str]:
    """Paths, from the place, of the folders below that hold a coder; hidden ones are left out."""
    if place.file is not None:
        return []
    found: list[str] = []
    level = [place.folder]
    for _ in range(_DEPTH):
        folders = [f for parent in level for f in sorted(parent.iterdir()) if _is_open_folder(f)]
        hits = [f for f in folders if recognised(Place(f, f"{place.shown}/{f.relative_to(place.folder).as_posix()}"))]
        found += [f.relative_to(place.folder).as_posix() for f in hits]
        level = [f for f in folders if f not in hits]
    return found


def names_in(names: Sequence[str], n: int = 40) -> str:
    """Names for a message, cut where there are very many."""
    return ", ".join(names[:n]) + (f", … ({len(names) - n} more)" if len(names) > n else "")


def _problems(place: Place) -> str:
    """What recognisers could not open."""
    return "".join(f". {text.removeprefix(place.shown + ': ')}" for text in place.problems.values())


def _is_open_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")
