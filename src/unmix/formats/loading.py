"""Load any published coder, or write it in another format. The format is found by content, never by trying."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from unmix.coder.coder_set import CoderSet
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import atomic_folder
from unmix.core.errors import ConfigError, FormatError, did_you_mean
from unmix.core.progress import task
from unmix.formats.detection import below, choose_format, names_in, nothing, recognised
from unmix.formats.draft import Draft
from unmix.formats.place import Place
from unmix.formats.provenance import with_origin
from unmix.formats.registry import Format, format_of
from unmix.formats.sources import fetch


def resolve(place: str | Path, below: bool = False) -> Place:
    """A local place behind a path or an address, which is fetched; with `below`, what lies under it too."""
    fetched = fetch(place, below=below)
    return Place(fetched.path, str(place), fetched.origin)


def load(place: str | Path, format: str | None = None, name: str | None = None) -> SparseCoder:
    """The coder at `place`. On the CPU, in float32 and evaluation mode; a large file stays memory-mapped.

    `place` is a folder, a file, `hf://owner/repo[@revision]/path`, `release:NAME/ID`, `wandb://entity/project/name` or
    `https://host/file`. `format` names the layout where several fit; by default it is recognised by content. `name`
    picks one coder where the place holds several (the error lists them). Raises `FormatError` (no such place, no or
    several formats, several coders, tensors or settings that do not fit), `CorruptError`, `NonFiniteError`,
    `ServiceError` where a remote place does not answer, and `MachineError` where an optional package is missing.
    """
    there = resolve(place)
    chosen = choose_format(there, format)
    return read_draft(chosen, there, _one_name(chosen, there, name)).coder()


def load_all(place: str | Path, format: str | None = None) -> Mapping[str, SparseCoder]:
    """Every coder at or below `place`, by name: its own, or its path from there.

    Coders whose writes add up (a cross-layer transcoder) come as a `CoderSet`, a mapping too. Raises as `load`.
    """
    there = resolve(place, below=True)
    drafts, joint = drafts_at(there, format)
    coders = {name: draft.coder() for name, draft in drafts.items()}
    return CoderSet(coders) if joint else coders


def convert(
    src: str | Path | SparseCoder,
    dst: str | Path,
    format: str,
    source_format: str | None = None,
    name: str | None = None,
) -> list[str]:
    """Write the coders of `src` to the new folder `dst` in `format`; returns their names.

    `src` is a place, as for `load`, or a coder in memory. Where it holds several coders and the format one a folder,
    each goes to a folder of its name. Tensors are read, rewritten and written one after the other, so memory holds
    about one of them. `FormatError` where the format cannot be written or cannot express a coder, or `dst` holds
    anything; then nothing is left there.
    """
    target = format_of(format)
    folder = Path(dst).expanduser()
    if not target.writable:
        raise FormatError(f"the format {format!r} can be read but not written")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FormatError(f"{dst}: there is something here already; name a new folder")
    drafts = _sources(src, source_format, name)
    with atomic_folder(folder) as temp, _progress(drafts):
        if len(drafts) == 1 or target.many:
            target.write(drafts, temp)
        else:
            for own, draft in drafts.items():
                _part_of(temp, own).mkdir(parents=True)
                target.write({own: draft}, temp / own)
    return list(drafts)


def detect(place: str | Path) -> str:
    """The name of the one format that `place` is in.

    `FormatError` where none is (saying what was looked for and what was found), where several are (saying how
    to choose), or where the place holds several coders (listing them).
    """
    return choose_format(resolve(place), None).name


def drafts_at(place: Place, format: str | None) -> tuple[dict[str, Draft], bool]:
    """Every coder at or below the place by name, tensors not made yet; and whether they write together."""
    if format is not None or recognised(place):
        chosen = choose_format(place, format)
        drafts = [read_draft(chosen, place, name) for name in chosen.coders(place)]
        named = {name or draft.config.name: draft for name, draft in zip(chosen.coders(place), drafts, strict=True)}
        return named, chosen.joint(place)
    found: dict[str, Draft] = {}
    for path in below(place):
        part = Place(place.folder / path, f"{place.shown}/{path}", place.origin)
        own, _ = drafts_at(part, None)
        found |= {path: next(iter(own.values()))} if len(own) == 1 else {f"{path}/{k}": d for k, d in own.items()}
    if not found:
        raise nothing(place)
    return found, False


def read_draft(format: Format, place: Place, name: str) -> Draft:
    """One coder of a recognised place, with a note of where it came from."""
    return with_origin(format.read(place, name), place, format.name)


def _part_of(folder: Path, name: str) -> Path:
    """The folder of one coder. Names may come from files: `FormatError` for one that leads out."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise FormatError(f"a coder is called {name!r}, which cannot be a folder's name")
    return folder / name


@contextmanager
def _progress(drafts: Mapping[str, Draft]) -> Generator[None]:
    """Count the bytes of the weights as they are written."""
    from unmix.formats.stores.writing import PROGRESS

    weights = [lazy for draft in drafts.values() for lazy in draft.state.values()]
    total = sum(lazy.like.numel() * lazy.dtype.itemsize for lazy in weights)
    with task("convert", total, unit="bytes") as shown:
        token = PROGRESS.set(shown)
        try:
            yield
        finally:
            PROGRESS.reset(token)


def _one_name(format: Format, place: Place, name: str | None) -> str:
    names = format.coders(place)
    if name is None and len(names) == 1:
        return names[0]
    if name is None and format.joint(place):
        raise FormatError(
            f"{place.shown}: holds {len(names)} coders whose writes add up; load_all gives them as one CoderSet"
        )
    if name is None:
        raise FormatError(
            f"{place.shown}: holds {len(names)} coders: {names_in(names)}; name one with name=…, or use load_all"
        )
    if name not in names:
        raise ConfigError(f"{place.shown}: no coder {name!r} here. {did_you_mean(name, names)}")
    return name


def _sources(src: str | Path | SparseCoder, format: str | None, name: str | None) -> dict[str, Draft]:
    if isinstance(src, SparseCoder):
        return {src.name: Draft.of(src)}
    there = resolve(src, below=name is None)
    if name is None:
        return drafts_at(there, format)[0]
    chosen = choose_format(there, format)
    return {name: read_draft(chosen, there, _one_name(chosen, there, name))}
