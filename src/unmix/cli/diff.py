"""`unmix diff`: which latents differ between two corpora, two models or two slices of one index."""

from __future__ import annotations

import sys
from pathlib import Path

from unmix.cli._words import read_words
from unmix.core.errors import ConfigError

USAGE = """usage: unmix diff A B [options]
       unmix diff INDEX --slice NAME=VALUE --against NAME=VALUE [options]

Compares every latent between two indexes (other text, or the same text through another model), or between two slices
of one: document labels (--slice label=wikipedia --against label=books), speakers (--slice speaker=user), roles
(--slice role=explain). Tests count documents, not tokens; q is the expected share of false ones among those listed.
Only stored statistics are read, and then the windows of the latents shown.

  --slice NAME=VALUE     the positions of A that count (with two indexes: of both)
  --against NAME=VALUE   the positions of B, or of the other side, that count
  --coder NAME           which coder, where an index has several; --coder-b NAME: of B, where it has another name
  --q Q                  latents with a q-value of at most this (default 0.05)
  --min-documents N      latents in fewer documents, both sides together, are not tested (default 10)
  --n N                  latents shown (default 20)
  --sort q|effect        by certainty (default), or by the end of the ratio's interval that is nearest to none
  --windows N            windows shown of each latent, of different documents (default 1; 0: none)
  --json FILE            everything about the latents shown, as JSON (-: to stdout instead of the table)
"""
_OPTIONS = ("slice", "against", "coder", "coder-b", "q", "min-documents", "n", "sort", "windows", "json")


def command(arguments: list[str]) -> int:
    """Compare, and print a table."""
    if "--help" in arguments or "-h" in arguments or not arguments:
        sys.stdout.write(USAGE)
        return 0
    words = sum(1 for i, word in enumerate(arguments) if not word.startswith("--") and not _is_value(arguments, i))
    asked = read_words(arguments, _OPTIONS, "diff", ("A", "B") if words != 1 else ("INDEX",))
    n, shown = asked.whole("n", 20), asked.whole("windows", 1)
    for name, number in (("n", n), ("windows", shown)):
        if number < 0:
            raise ConfigError(f"--{name} {number}: expected 0 or more")
    if words == 1 and not {"slice", "against"} <= set(asked.options):
        raise ConfigError("one index is compared with itself by two slices: give both --slice and --against")
    target = asked.get("json")
    if target not in (None, "-") and Path(str(target)).is_dir():
        raise ConfigError(f"--json {target}: is a folder, expected a file")
    from unmix.cli._index_place import require_index
    from unmix.index.differences.comparison import ORDERS, diff
    from unmix.index.differences.text import table

    by = asked.options.get("sort", "q")
    if by not in ORDERS:
        raise ConfigError(f"--sort {by}: expected {' or '.join(ORDERS)}")
    for place in asked.words:
        require_index(place)
    found = diff(
        asked.words[0], asked.words[1] if words != 1 else None, slice=asked.get("slice"), against=asked.get("against"),
        coder=asked.get("coder"), coder_b=asked.get("coder-b"), q=asked.number("q", 0.05),
        min_documents=asked.whole("min-documents", 10),
    )  # fmt: skip
    if target is not None:
        _write_json(target, found.facts(n, by, max(shown, 3)))
    if target != "-":
        sys.stdout.write("\n".join(table(found, found.top(n, by, shown))) + "\n")
    return 0


def _is_value(arguments: list[str], i: int) -> bool:
    """Whether a word is the value of the option before it."""
    return i > 0 and arguments[i - 1].startswith("--") and "=" not in arguments[i - 1]


def _write_json(target: str, facts: dict[str, object]) -> None:
    from unmix.core.atomic import write_json

    if target != "-":
        write_json(target, facts)
        return
    import json

    sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
