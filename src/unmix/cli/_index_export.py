"""`unmix index export`: an index as delphi's cache, or as Parquet."""

from __future__ import annotations

import sys
from pathlib import Path

from unmix.cli._sizes import parse_bytes
from unmix.cli._words import Words, read_words
from unmix.core.errors import ConfigError

USAGE = """usage: unmix index export INDEX OUT --format delphi|parquet [options]

delphi: a folder that delphi 0.1 reads as its own cache (float16, |activation| above 1e-5).
  --splits N             files a coder (default 5)
  --tokens yes|no        tokens in every file (default yes); without, delphi tokenises its data set anew
  --plain                nothing of unmix's beside the cache: documents, roles and token strings are lost
parquet: one file for DuckDB, polars and others (needs unmix[parquet]).
  --rows postings|windows     one row a posting (default), or one row a window
  --latents N,N…         only these latents
  --kind KIND --n N --seed N  windows: quantiles (default), top, random …, how many of each latent (default 20)

  --coder NAME           only this coder (may be said several times)
  --budget SIZE          memory to work in (delphi; default 1GiB)
"""
_OPTIONS = ("format", "splits", "tokens", "rows", "latents", "kind", "n", "seed", "budget")
_OF = {"delphi": ("splits", "tokens", "budget"), "parquet": ("rows", "latents", "kind", "n", "seed")}


def command(arguments: list[str]) -> int:
    """Write the index in another format."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    plain = "--plain" in arguments
    asked = read_words([w for w in arguments if w != "--plain"], _OPTIONS, "index export", ("INDEX", "OUT"), ("coder",))
    format = asked.get("format")
    if format not in _OF:
        raise ConfigError(f"--format {format or 'is missing'}: expected delphi or parquet")
    foreign = [name for name in asked.options if name != "format" and name not in _OF[format]]
    if foreign or (plain and format != "delphi"):
        raise ConfigError(f"--{foreign[0] if foreign else 'plain'} is not an option of --format {format}")
    return _delphi(asked, plain) if format == "delphi" else _parquet(asked)


def _delphi(asked: Words, plain: bool) -> int:
    from unmix.cli._index_place import require_index
    from unmix.index import open_index
    from unmix.index.exchange import write_delphi
    from unmix.index.exchange.delphi_writing import DEFAULT_BUDGET

    tokens = asked.get("tokens", "yes")
    if tokens not in ("yes", "no"):
        raise ConfigError(f"--tokens {tokens}: expected yes or no")
    place, out = asked.words
    dropped = write_delphi(
        open_index(require_index(place)), out, coders=_coders(asked), splits=asked.whole("splits", 5),
        tokens=tokens == "yes", plain=plain,
        budget_bytes=parse_bytes("budget", asked.options.get("budget", str(DEFAULT_BUDGET))),
    )  # fmt: skip
    for name, n in dropped.items():
        if n:
            sys.stdout.write(f"{name}: {n:,} postings of at most 1e-5 left out, as delphi does\n")
    sys.stdout.write(f"{out}\n")
    return 0


def _parquet(asked: Words) -> int:
    from unmix.cli._index_place import require_index
    from unmix.index import open_index
    from unmix.index.exchange import write_parquet

    place, out = asked.words
    rows = asked.options.get("rows", "postings")
    needless = [name for name in ("kind", "n", "seed") if name in asked.options and rows != "windows"]
    if needless:
        raise ConfigError(f"--{needless[0]} is of windows: give --rows windows too")
    _refuse_foreign(out)
    written = write_parquet(
        open_index(require_index(place)), out, rows=rows, coders=_coders(asked), latents=_latents(asked.get("latents")),
        kind=asked.options.get("kind", "quantiles"), n=asked.whole("n", 20), seed=asked.whole("seed", 0),
    )  # fmt: skip
    sys.stdout.write(f"{written:,} rows\n{out}\n")
    return 0


def _refuse_foreign(out: str) -> None:
    """`ConfigError` where something else than an older Parquet file is at the place to write."""
    path = Path(out)
    if path.is_dir():
        raise ConfigError(f"{out}: is a folder, expected a file to write, such as {path / 'postings.parquet'}")
    if path.exists():
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise ConfigError(f"{out}: exists and is no Parquet file; choose another name")


def _coders(asked: Words) -> list[str] | None:
    return [value for _, value in asked.again] or None


def _latents(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--latents {text}: expected whole numbers with commas between them") from None
