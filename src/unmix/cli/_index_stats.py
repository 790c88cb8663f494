"""`unmix index stats`: figures, rankings and plots of an index."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmix.cli._words import Words, read_words
from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from unmix.index.rankings import Noise
    from unmix.index.reader import LatentIndex

USAGE = """usage: unmix index stats FOLDER [--coder NAME] [--rank KIND[,KIND…]] [--list WHAT] [--tokens " Paris, Rome"]
                         [--n N] [--json] [--plots FOLDER]

Says what an index holds: tokens by role and slice, and of each coder its latents, L0, dead and dense ones.

  --coder NAME       this coder only
  --rank KIND        latents in order, with their top tokens. KIND: frequency, rare, documents, max, mean, median, skew,
                     kurtosis, place (fires at some places of the context), token (one token has most of its strength)
  --list WHAT        ids of the dead, dense or single-token latents
  --tokens TOKENS    latents by the share of their firings on these tokens: exact strings, commas between them (a space
                     before a word belongs to it), or ids as #1234
  --by ORDER         of --tokens: share (default), strength, recall, f1 or count
  --everywhere       of --tokens: look at every latent, not only where a token is among the top ones (reads everything)
  --n N              rows of a ranking (default 20)
  --plots FOLDER     draw frequency.svg, activation.svg and places.svg there
  --json             everything asked for, as JSON

What rankings leave out as noise:
  --min-firings N    latents that fire less often (default 10)
  --min-documents N  latents that fire in fewer documents (default 2)
  --max-frequency X  latents that fire on a larger share of the positions: 0.1 keeps dense ones away (default 1)
  --no-single-token  latents with nine tenths of their strength on one token
"""
_FLAGS = ("json", "everywhere", "no-single-token")
_OPTIONS = ("coder", "rank", "list", "tokens", "by", "n", "plots", "min-firings", "min-documents", "max-frequency")
_SHOWN = 6
"""Top tokens of a latent in a table."""
_VALUES = 12
"""Values of a slicing in the table: those with the most tokens."""


def command(arguments: list[str]) -> int:
    """Print tables, or JSON."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    flags = {word[2:] for word in arguments if word in [f"--{flag}" for flag in _FLAGS]}
    asked = read_words([w for w in arguments if w[2:] not in flags], _OPTIONS, "index stats", ("FOLDER",))
    _check_words(asked, flags)
    from unmix.cli._index_place import require_index
    from unmix.index.reader import open_index

    index = open_index(require_index(asked.words[0]))
    names = [index.coder(asked.options["coder"]).name] if "coder" in asked.options else index.names
    found = _gather(index, names, asked, flags)
    plots = _plots(index, names, asked)
    if "json" in flags:
        text = json.dumps(found | ({"plots": plots} if plots else {}), indent=2, ensure_ascii=False, allow_nan=False)
    else:
        blocks = [] if _questions(asked) else [*_summary(found)]
        for name in names:
            blocks += [_ranking(index, name, kind, one) for kind, one in _of(found, "rankings", name)]
            blocks += [_listing(name, what, ids) for what, ids in _of(found, "lists", name)]
            blocks += [_token_set(index, name, asked.options["tokens"], hits) for _, hits in _of(found, "tokens", name)]
        text = "\n\n".join(blocks + (["\n".join(f"plot  {path}" for path in plots)] if plots else []))
    sys.stdout.write(text + "\n")
    return 0


def _check_words(asked: Words, flags: set[str]) -> None:
    """What the words alone can tell."""
    said = set(asked.options) | flags
    for name in ("by", "everywhere", "n", "min-firings", "min-documents", "max-frequency", "no-single-token"):
        of = ("tokens",) if name in ("by", "everywhere") else ("rank", "tokens")
        if name in said and not said & set(of):
            raise ConfigError(f"--{name} belongs to {' and '.join(f'--{one}' for one in of)}")
    for name in ("min-firings", "min-documents"):
        if asked.whole(name, 0) < 0:
            raise ConfigError(f"--{name} {asked.options[name]}: expected 0 or more")
    if not 0 < asked.number("max-frequency", 1.0) <= 1:
        raise ConfigError(f"--max-frequency {asked.options['max-frequency']}: expected more than 0 and at most 1")


def _questions(asked: Words) -> bool:
    """Whether something else than the summary was asked for."""
    return bool({"rank", "list", "tokens"} & set(asked.options))


def _gather(index: LatentIndex, names: Sequence[str], asked: Words, flags: set[str]) -> dict[str, Any]:
    """The summary and everything asked for, as plain values: what `--json` prints."""
    from unmix.index.rankings import Noise, frequency_histogram, listed, rank
    from unmix.index.token_sets import latents_by_tokens

    n, noise = asked.whole("n", 20), _noise(asked, flags, Noise)
    found = index.stats
    found["coders"] = {name: found["coders"][name] for name in names}
    figures = {name: index.coder(name).figures for name in names}
    edges, counts = frequency_histogram(list(figures.values()))
    found["frequency_histogram"] = {
        "log10_edges": edges.tolist(),
        "latents": {name: one.tolist() for name, one in zip(names, counts, strict=True)},
    }
    if "rank" in asked.options:
        kinds = asked.options["rank"].split(",")
        rankings = {name: {kind: rank(figures[name], kind, n, noise) for kind in kinds} for name in names}
        found["rankings"] = {
            name: {
                kind: {
                    "considered": one.considered,
                    "latents": [
                        {"latent": latent, "value": value}
                        for latent, value in zip(one.latents.tolist(), one.values.tolist(), strict=True)
                    ],
                }
                for kind, one in by_kind.items()
            }
            for name, by_kind in rankings.items()
        }
    if "list" in asked.options:
        what = asked.options["list"]
        found["lists"] = {name: {what: listed(figures[name], what).tolist()} for name in names}
    if "tokens" in asked.options:
        ids, by = _token_ids(index, asked.options["tokens"]), asked.get("by", "share") or "share"
        found["tokens"] = {}
        for name in names:
            hits = latents_by_tokens(
                index, ids, n, coder=name, by=by, noise=noise, everywhere="everywhere" in flags
            )  # fmt: skip
            found["tokens"][name] = {asked.options["tokens"]: [{**vars(hit), "f1": hit.f1} for hit in hits]}
    return found


def _noise(asked: Words, flags: set[str], kind: type[Noise]) -> Noise:
    plain = kind()
    return kind(
        asked.whole("min-firings", plain.min_firings), asked.whole("min-documents", plain.min_documents),
        asked.number("max-frequency", plain.max_frequency), "no-single-token" not in flags,
    )  # fmt: skip


def _token_ids(index: LatentIndex, text: str) -> list[int]:
    from unmix.index.queries import token_ids

    words = text.split(",")
    tokens = [
        int(word.strip()[1:]) if word.strip()[1:].isdigit() and word.strip()[0] == "#" else word for word in words
    ]
    return [int(i) for i in token_ids(index.store, tokens)]


def _plots(index: LatentIndex, names: Sequence[str], asked: Words) -> list[str]:
    if "plots" not in asked.options:
        return []
    from unmix.index.plots import write_plots

    folder = Path(asked.options["plots"])
    if folder.is_file():
        raise ConfigError(f"--plots {folder}: is a file, expected a folder")
    return [str(path) for path in write_plots(index, folder, names)]


def _of(found: dict[str, Any], what: str, coder: str) -> list[tuple[str, Any]]:
    """The answers of one sort for one coder, by what was asked."""
    return list(found.get(what, {}).get(coder, {}).items())


def _summary(found: dict[str, Any]) -> list[str]:
    from unmix.cli.plan import sized

    meta = {k: v for k, v in found["meta"].items() if isinstance(v, (str, int, float))} | _source(found)
    head = [
        f"{found['folder']}  ({found['hash']})",
        f"{found['n_tokens']:,} tokens, {found['n_counted']:,} of them counted; {found['n_contexts']:,} contexts of "
        f"{found['context']}; {found['n_documents']:,} documents; {sized(found['bytes'])} in {found['segments']} "
        f"segment{'s' if found['segments'] != 1 else ''}",
        *(f"{key}: {_printable(str(value))}" for key, value in meta.items()),
    ]
    coders = found["coders"].values()
    where = [["", "", "tokens", "documents", *(f"L0 {name}" for name in found["coders"])]]
    for role, facts in found["roles"].items():
        if facts["counted"]:
            l0 = [f"{one['l0_in']['role'][role]:.4g}" for one in coders]
            where.append(["role", role, f"{facts['counted']:,}", f"{found['role_documents'][role]:,}", *l0])
    for name, values in found["slices"].items():
        used = sorted((value for value in values if values[value]["counted"]), key=lambda v: -values[v]["counted"])
        for value in [value for value in values if value in used[:_VALUES]]:
            facts, l0 = values[value], [f"{one['l0_in'][name][value]:.4g}" for one in coders]
            where.append([name, _printable(value), f"{facts['counted']:,}", f"{facts['documents']:,}", *l0])
        if len(used) > _VALUES:
            left = sum(values[value]["counted"] for value in used[_VALUES:])
            where.append([name, f"{len(used) - _VALUES} more (--json)", f"{left:,}", "", *("" for _ in coders)])
    # Two lines of titles, so that a terminal of 80 columns has room for the row.
    rows = [
        ["", "", "", "", "dense", "", "", "frequency", "one token", ""],
        ["coder", "latents", "alive", "dead", ">1%", ">10%", "L0", "(median)", "≥50%", "≥90%"],
    ]
    for name, one in found["coders"].items():
        single = one["single_token"]
        counts = (one["n_latents"], one["alive"], one["dead"], *one["dense"].values())
        rows.append([
            name, *(f"{count:,}" for count in counts), f"{one['l0']:.4g}", _share(one["frequency_median"]),
            f"{single['weak']:,}", f"{single['strong']:,}",
        ])  # fmt: skip
    return ["\n".join(head), _table(where, 2), _table(rows)]


def _source(found: dict[str, Any]) -> dict[str, str]:
    """The model's name and the hook of each coder, where the index knows them."""
    model, hooks = found["meta"].get("model"), found["meta"].get("hook")
    said = {"model": str(model["name"])} if isinstance(model, dict) and "name" in model else {}
    if isinstance(hooks, dict) and all(isinstance(hook, str) for hook in hooks.values()):
        named = [f"{hooks[name]} ({name})" for name in found["coders"] if name in hooks]
        said |= {"hook": ", ".join(named)} if named else {}
    return said


def _ranking(index: LatentIndex, coder: str, kind: str, found: dict[str, Any]) -> str:
    from unmix.index.rankings import UNITS

    figures = index.coder(coder).figures
    unit = f"{kind}, {UNITS[kind]}" if UNITS[kind] else kind
    rows = [["latent", unit, "firings", "documents", "frequency", "max", "top tokens"]]
    for one in found["latents"]:
        i, value = one["latent"], one["value"]
        shown = _share(value) if UNITS[kind].startswith("of ") else f"{value:.4g}"
        counts = [f"{figures.firings[i]:,}", f"{figures.documents[i]:,}"]
        tokens = _tokens(index, figures.top_token_ids[i])
        rows.append([str(i), shown, *counts, _share(float(figures.frequency[i])), f"{figures.max[i]:.4g}", tokens])
    title = f"{coder}: by {kind}, {len(found['latents']):,} of {found['considered']:,} latents that are not noise"
    if kind in ("frequency", "rare", "max"):  # said already
        at = 4 if kind != "max" else 5
        rows = [row[:at] + row[at + 1 :] for row in rows]
    return title + "\n" + (_table(rows, 1, last=True) if found["latents"] else "none")


def _token_set(index: LatentIndex, coder: str, asked: str, hits: Sequence[dict[str, Any]]) -> str:
    figures = index.coder(coder).figures
    rows = [["latent", "share", "of strength", "recall", "f1", "lift", "on them", "firings", "top tokens"]]
    for hit in hits:
        shares = [_share(hit[key]) for key in ("share", "strength", "recall")]
        numbers = [f"{hit['f1']:.3f}", f"{hit['lift']:,.4g}", f"{hit['count']:,}", f"{hit['firings']:,}"]
        tokens = _tokens(index, figures.top_token_ids[hit["latent"]])
        rows.append([str(hit["latent"]), *shares, *numbers, tokens])
    title = f"{coder}: latents by their firings on {_printable(asked)}"
    return title + "\n" + (_table(rows, 1, last=True) if hits else "none")


def _listing(coder: str, what: str, ids: Sequence[int]) -> str:
    return f"{coder}: {len(ids):,} {what} latents\n" + (" ".join(map(str, ids)) or "none")


def _tokens(index: LatentIndex, ids: np.ndarray) -> str:
    known = [i for i in ids.tolist() if i >= 0][:_SHOWN]
    strings = index.token_strings(known) or [f"#{i}" for i in known]
    return " ".join(_printable(json.dumps(string, ensure_ascii=False)) for string in strings)


def _printable(text: str) -> str:
    """The text with everything escaped that would move a terminal's cursor or turn its writing round."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _share(value: float) -> str:
    return f"{100 * value:.3g} %" if value == 0 or value >= 1e-5 else f"{100 * value:.1e} %"


def _table(rows: Sequence[Sequence[str]], left: int = 1, last: bool = False) -> str:
    """Columns two spaces apart: the first `left` flush left, the others right, the `last` one left again."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left or (last and i == len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
