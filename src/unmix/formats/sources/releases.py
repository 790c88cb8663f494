"""Published coders by name: `release:NAME/ID`, looked up in the catalogue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from unmix.core.errors import FormatError, nearest
from unmix.formats.sources.base import Fetched
from unmix.formats.sources.catalogue import ANY, Catalogue, Entry, Pattern, Scalar, catalogue, fill

SCHEME = "release:"
_CANONICAL = "canonical"


@dataclass(frozen=True)
class Release:
    """One coder of a release."""

    entry: Entry
    id: str
    source: str
    """Where it is. With `choose`, the folder whose sub-folders are the coders that the ID may mean."""
    facts: dict[str, Scalar]
    """What is known of it: model, hook, hook_out, format, licence, url, width, l0, fvu, …"""
    choose: re.Pattern[str] | None = None
    """What the sub-folders are called, where the ID leaves one part open; its one group is that part."""


def resolve_release(text: str, releases: Catalogue | None = None) -> Release:
    """`release:NAME/ID` looked up. `FormatError` naming the nearest where there is no such name or ID.

    Each of the release's other names works too. An ID may leave out its last part where that is listed at the source
    (`layer_20/width_16k` of Gemma Scope): it then means the one coder there is, and with several an error lists them.
    """
    known = releases or catalogue()
    name, _, wanted = text.removeprefix(SCHEME).partition("/")
    entry = known.find(name)
    if entry is None:
        near = nearest(name, known.names())
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        raise FormatError(f"{text}: no release {name!r}. {hint}`unmix releases` lists all {len(known.entries)}")
    wanted = wanted.strip("/")
    if not wanted:
        only = entry.ids()
        if len(only) > 1 or ANY in only[0]:
            raise FormatError(f"{text}: which of its {len(only)} coders? {_how(entry)}")
        wanted = only[0]
    for pattern in entry.coders:
        found = _match(pattern, wanted)
        if found is not None:
            bound, choose = found
            return _release(entry, pattern, wanted, bound, choose)
    raise FormatError(f"{text}: {entry.name} has no coder {wanted!r}. {_hint(entry, wanted)}")


def fetch(text: str, *, below: bool = False) -> Fetched:
    """The coder of a release, fetched from where it is published. Errors as `resolve_release` and that source's."""
    from unmix.formats.sources.fetching import fetch as fetch_source

    release = resolve_release(text)
    source, facts = release.source, dict(release.facts)
    if release.choose is not None:
        name, value = _choose(release, text)
        source = f"{source}/{name}"
        variable = next(iter(release.choose.groupindex))
        facts |= {variable: int(value) if value.isdigit() else value, "id": release.id + "/" + name.rpartition("/")[2]}
    found = fetch_source(source, below=below)
    origin = {**found.origin, "scheme": "release", "place": text, "source": source, "release": facts}
    return Fetched(found.path, origin)


def _match(pattern: Pattern, wanted: str) -> tuple[dict[str, str], re.Pattern[str] | None] | None:
    """The variables' values that make `wanted` from the pattern; the second part where one is left open."""
    bound = _bind(pattern, pattern.id, wanted)
    if bound is not None:
        return bound, None
    if pattern.open is None or "/" not in pattern.id:
        return None
    folder = pattern.id.rpartition("/")[0]
    parent, _, last = wanted.rpartition("/")
    if last == _CANONICAL and (bound := _bind(pattern, folder, parent)) is not None:
        first = next(iter(pattern.values))
        run = pattern.canonical.get(bound.get("width", ""))
        value = run[pattern.values[first].index(bound[first])] if run else None
        return None if value is None else ({**bound, pattern.open: str(value)}, None)
    bound = _bind(pattern, folder, wanted)
    if bound is None:
        return None
    part = pattern.source.rpartition("/")[2]
    return bound, re.compile(_expression(fill(part, bound)))


def _bind(pattern: Pattern, template: str, text: str) -> dict[str, str] | None:
    match = re.fullmatch(_expression(template), text)
    if match is None or text in pattern.absent:
        return None
    bound = match.groupdict()
    if any(pattern.values[name] != (ANY,) and value not in pattern.values[name] for name, value in bound.items()):
        return None
    if any(value == _CANONICAL for value in bound.values()):
        return None
    runs = pattern.running(bound)
    if any(f"{{{name}}}" in pattern.source and value is None for name, value in runs.items()):
        return None
    return {**bound, **{name: str(value) for name, value in runs.items() if value is not None}}


def _expression(template: str) -> str:
    """A regular expression that reads the variables back out of a filled template."""
    parts = re.split(r"\{(\w+)\}", template)
    seen: set[str] = set()
    found = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            found += re.escape(part)
        else:
            found += f"(?P={part})" if part in seen else f"(?P<{part}>[^/]+?)"
            seen.add(part)
    return found + "$"


def _release(
    entry: Entry, pattern: Pattern, wanted: str, bound: Mapping[str, str], choose: re.Pattern[str] | None
) -> Release:
    runs = {name: value for name, value in pattern.running(bound).items() if value is not None}
    facts: dict[str, Scalar] = {"name": entry.name, "id": wanted, "model": entry.model, "format": entry.format}
    said = {"licence": entry.licence, "url": entry.url, "hook": pattern.hook, "hook_out": pattern.writes}
    facts |= {key: fill(value, bound) for key, value in said.items() if value}
    facts |= {name: int(value) if value.isdigit() else value for name, value in bound.items() if name not in runs}
    facts |= {name: value for name, value in runs.items() if f"{{{name}}}" not in pattern.source}
    facts |= {key: fill(value, bound) if isinstance(value, str) else value for key, value in pattern.facts.items()}
    source = fill(pattern.source if choose is None else pattern.source.rpartition("/")[0], bound)
    return Release(entry, wanted, source, facts, choose)


def _choose(release: Release, text: str) -> tuple[str, str]:
    """Name and open value of the one sub-folder at the source that fits."""
    from unmix.formats.sources import hub

    assert release.choose is not None
    matches = [m for m in map(release.choose.fullmatch, hub.subfolders(release.source)) if m is not None]
    if len(matches) == 1:
        return matches[0][0], matches[0][1]
    if not matches:
        raise FormatError(f"{text}: {release.source} holds none of these coders now")
    names = sorted((m[0] for m in matches), key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])
    raise FormatError(f"{text}: {len(names)} coders; name one: {', '.join(f'{release.id}/{n}' for n in names)}")


def _hint(entry: Entry, wanted: str) -> str:
    near = nearest(wanted, entry.ids())
    return f"Did you mean {' or '.join(repr(n) for n in near)}? {_how(entry)}" if near else _how(entry)


def _how(entry: Entry) -> str:
    ids = entry.ids()
    return f"`unmix releases --ids {entry.name}` lists them ({len(ids):,}, such as {ids[0]!r})"
