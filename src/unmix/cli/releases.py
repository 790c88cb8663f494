"""`unmix releases`: the published coders that can be loaded by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from unmix.core.errors import ConfigError, did_you_mean, nearest

if TYPE_CHECKING:
    from unmix.formats.sources.catalogue import Catalogue, Entry, Pattern

USAGE = """usage: unmix releases [SEARCH …] [--ids NAME] [--file FILE] [--json]

Lists the published coders that `release:NAME/ID` loads: name, model, what they read and write, width, L0 where it was
published, format, number of coders and source. SEARCH words must all occur in a release's name, model, format, hooks
or source. --ids NAME lists the IDs of one release (* stands for numbers that the source itself lists). --file FILE
adds a file of releases, as the environment variable UNMIX_RELEASES does. --json prints everything.
"""
WIDTH = 100


def command(arguments: list[str]) -> int:
    """Print releases, or the IDs of one."""
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    words, options = _parse(arguments)
    from unmix.formats.sources.catalogue import catalogue

    known = catalogue(options.get("file"))
    if "ids" in options:
        entry = known.find(options["ids"])
        if entry is None:
            raise ConfigError(f"no release {options['ids']!r}. {_near(known, options['ids'])}")
        _write(list(_ids(entry, words)), "json" in options, f"{entry.name} has no ID with {' '.join(words)!r} in it")
        return 0
    found = [e for e in known.entries.values() if all(word.lower() in _text(e) for word in words)]
    if "json" in options:
        sys.stdout.write(json.dumps([_facts(e) for e in found], indent=2) + "\n")
    elif found:
        sys.stdout.write("\n".join(_table(found)) + "\n")
    else:
        raise ConfigError(f"no release has {' '.join(words)!r} in it. {_near(known, words[0])}")
    return 0


def _parse(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    words: list[str] = []
    options: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--json":
            options["json"] = "yes"
        elif word.startswith("--") and name in ("ids", "file"):
            if not equals and not rest:
                raise ConfigError(f"--{name} needs a value; see unmix releases --help")
            options[name] = value if equals else rest.pop(0)
        elif word.startswith("-"):
            raise ConfigError(f"unknown flag {word!r}. {did_you_mean(word, ['--ids', '--file', '--json'])}")
        else:
            words.append(word)
    return words, options


def _text(entry: Entry) -> str:
    """What a search looks in."""
    parts = [entry.name, *entry.also, entry.model, entry.format, entry.note]
    parts += [text for p in entry.coders for text in (p.hook, p.writes, p.source)]
    return " ".join(parts).lower()


def _near(known: Catalogue, word: str) -> str:
    """The names, or parts of names, that are most like `word`."""
    parts = {part.lower() for name in known.names() for part in re.split(r"[-_]", name) if len(part) > 3}
    near = nearest(word, known.names()) or nearest(word.lower(), sorted(parts))
    return f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else "`unmix releases` lists them all."


def _ids(entry: Entry, words: list[str]) -> Iterator[str]:
    for name in entry.ids():
        if all(word.lower() in name.lower() for word in words):
            yield f"release:{entry.name}/{name}"


def _write(ids: list[str], as_json: bool, nothing: str) -> None:
    if as_json:
        sys.stdout.write(json.dumps(ids, indent=2) + "\n")
    elif ids:
        sys.stdout.write("\n".join(ids) + "\n")
    else:
        raise ConfigError(nothing)


def _facts(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "also": list(entry.also),
        "model": entry.model,
        "format": entry.format,
        "licence": entry.licence,
        "url": entry.url,
        "note": entry.note,
        "hooks": _hooks(entry),
        "width": _known(entry, "width"),
        "l0": _known(entry, "l0"),
        "coders": len(entry.ids()),
        "sources": [p.source for p in entry.coders],
    }


def _hooks(entry: Entry) -> list[str]:
    """`resid_post`, `mlp_in → mlp_out`: what the coders read and write, without the layer."""
    pairs = [(_point(p.hook), _point(p.writes)) for p in entry.coders if p.hook]
    return list(dict.fromkeys(f"{reads} → {writes}" if writes else reads for reads, writes in pairs))


def _point(hook: str) -> str:
    parts = hook.split(".", 2)
    return parts[2] if len(parts) == 3 and parts[0] == "blocks" else hook


def _known(entry: Entry, fact: str) -> list[str]:
    """The published values of one fact, in the order in which they are met."""
    values: list[str] = []
    for pattern in entry.coders:
        values += [str(v) for v in _values(pattern, fact)]
    return list(dict.fromkeys(values))


def _values(pattern: Pattern, fact: str) -> list[Any]:
    said = pattern.facts.get(fact)
    if fact in pattern.along:
        return [v for v in pattern.along[fact] if v is not None]
    if isinstance(said, str) and said == f"{{{fact}}}":
        said = None
    if said is not None and not (isinstance(said, str) and said.startswith("{")):
        return [said]
    name = pattern.facts.get(fact, f"{{{fact}}}")
    words = pattern.values.get(str(name).strip("{}"), ())
    return [word for word in words if word != "*"]


def _table(entries: list[Entry]) -> list[str]:
    """Two lines a release: what it is, and, indented, where and in which layout."""
    lines: list[str] = []
    for entry in entries:
        hooks = ", ".join(_hooks(entry))
        about = [entry.model, hooks, _span("width", _known(entry, "width")), _span("L0", _known(entry, "l0"))]
        lines.append(entry.name)
        lines += _wrapped("  ".join(part for part in about if part))
        count = len(entry.ids())
        what = "1 coder" if count == 1 else f"{count:,}{'+' if any(p.open for p in entry.coders) else ''} coders"
        lines += _wrapped(f"{entry.format}, {what}, {_where(entry)}")
    return [
        *lines,
        "",
        f"{len(entries):,} releases. unmix releases --ids NAME lists the IDs; load with release:NAME/ID",
    ]


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)


def _span(label: str, values: list[str]) -> str:
    """`width 16k, 65k`; numbers in a range, `L0 10–70`."""
    if not values:
        return ""
    numbers = [float(v) for v in values if v.replace(".", "", 1).isdigit()]
    if len(numbers) == len(values) and len(values) > 3:
        return f"{label} {min(numbers):g}–{max(numbers):g}"
    return f"{label} {', '.join(values)}"


def _where(entry: Entry) -> str:
    """The place that all sources of a release share: `hf://owner/repo`, or host and folder."""
    sources = [p.source for p in entry.coders]
    scheme, _, rest = sources[0].partition("://")
    parts = rest.split("/")
    shown = f"{scheme}://{'/'.join(parts[:2])}"
    return shown if "{" not in shown else f"{scheme}://{parts[0]}/{parts[1].split('{')[0]}…"
