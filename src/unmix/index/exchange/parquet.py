"""An index → Parquet, for DuckDB, polars and anyone else: one row a posting, or one row a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmix.core.atomic import atomic_file
from unmix.core.errors import ConfigError, did_you_mean, missing_extra
from unmix.core.progress import task
from unmix.index.exchange.runs import latent_runs, open_postings, postings
from unmix.index.reader import CoderIndex, LatentIndex

ROWS = ("postings", "windows")
GROUP = 2**18
"""Rows of a group: what a reader takes in at once, and what is held here (some hundred bytes a row)."""
COLUMNS = ("coder", "latent", "context", "position", "document", "token", "string", "activation", "role")
"""What every row of postings has."""
LATENTS = 256
"""Latents whose windows are drawn before they are written."""


def write_parquet(
    index: LatentIndex,
    path: str | Path,
    *,
    rows: str = "postings",
    coders: Sequence[str] | None = None,
    latents: Sequence[int] | None = None,
    kind: str = "quantiles",
    n: int = 20,
    context: tuple[int, int] = (16, 15),
    seed: int = 0,
    group: int = GROUP,
) -> int:
    """Write one Parquet file, row group by row group; the number of rows.

    Args:
        rows: "postings": coder, latent, context, position (inside it), document, token, string, activation, role and
            one column a slicing, latent by latent in order of position. "windows": coder, latent, kind, rank, peak,
            peak_at, quantile, context, start, document, role, tokens, strings, activations (lists).
        coders: which coders (default: all); `latents`: which of their latents (default: all).
        kind: of windows, with `n`, `context` and `seed` as `Latent.windows` takes them.

    Raises:
        ConfigError: rows that are neither. MachineError: no pyarrow.
    """
    if rows not in ROWS:
        raise ConfigError(f"rows is {rows!r}. {did_you_mean(rows, ROWS)}")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_extra("pyarrow", "parquet", "writing Parquet") from error
    chosen = [index.coder(name) for name in (coders or index.names)]
    written = 0

    def tables() -> Iterator[Any]:
        for coder in chosen:
            ids = np.arange(len(coder)) if latents is None else np.array([coder[i].id for i in latents], np.int64)
            if rows == "postings":
                yield from _posting_tables(pa, index, coder, ids, group)
            else:
                yield from _window_tables(coder, ids, kind, n, context, seed)

    total = sum(int(coder.figures.firings.sum()) for coder in chosen) if rows == "postings" else 0
    schema = _posting_schema(pa, index) if rows == "postings" else _window_schema(pa)
    with (
        atomic_file(path) as temp,
        task("export", total) as progress,
        pq.ParquetWriter(temp, schema, compression="zstd") as writer,
    ):
        for columns in tables():
            batch = pa.table(columns, schema=schema)
            writer.write_table(batch, row_group_size=group)
            written += batch.num_rows
            progress.advance(batch.num_rows)
    return written


def _posting_schema(pa: Any, index: LatentIndex) -> Any:
    names = pa.dictionary(pa.int32(), pa.string())
    fields = {
        "coder": names, "latent": pa.int32(), "context": pa.int64(), "position": pa.int32(), "document": pa.int32(),
        "token": pa.int64(), "string": names, "activation": pa.float32(), "role": names,
    }  # fmt: skip
    return pa.schema([*fields.items(), *((_column(name), names) for name in index.description.slices)])


def _column(slicing: str) -> str:
    """Name of a slicing's column: its own, but for those that every row has."""
    return f"slice_{slicing}" if slicing in COLUMNS else slicing


def _posting_tables(
    pa: Any, index: LatentIndex, coder: CoderIndex, ids: np.ndarray, group: int
) -> Iterator[dict[str, Any]]:
    store, context, strings = open_postings(index, coder), index.context, _Strings(pa, index)
    tokens, documents = index.store.tokens.reshape(-1), index.store.documents.reshape(-1)
    slices = {name: (values.reshape(-1), index.description.slices[name]) for name, values in index.store.slices.items()}
    for run in _consecutive(ids):
        for first, last in latent_runs(coder.figures.firings[run[0] : run[1]], run[0], group):
            latent, position, value = postings(store, first, last)
            for start in range(0, len(position), group):
                cut = slice(start, start + group)
                at = position[cut]
                row = at // context
                yield {
                    "coder": _dictionary(pa, np.zeros(len(at), np.int32), [coder.name]),
                    "latent": latent[cut].astype(np.int32), "context": row,
                    "position": (at - row * context).astype(np.int32), "document": documents[at],
                    "token": tokens[at].astype(np.int64), "string": strings.of(tokens[at]), "activation": value[cut],
                    "role": _dictionary(pa, index.store.role_of[row], index.roles),
                    **{_column(name): _dictionary(pa, numbers[at], names) for name, (numbers, names) in slices.items()},
                }  # fmt: skip


class _Strings:
    """Display strings of tokens as a dictionary column; each group carries those that it uses."""

    def __init__(self, pa: Any, index: LatentIndex) -> None:
        self._pa, self._index = pa, index

    def of(self, tokens: np.ndarray) -> Any:
        used, place = np.unique(tokens, return_inverse=True)
        strings = self._index.token_strings(used)
        if strings is None:
            return self._pa.nulls(len(tokens), self._pa.dictionary(self._pa.int32(), self._pa.string()))
        return _dictionary(self._pa, place, strings)


def _dictionary(pa: Any, numbers: np.ndarray, names: Sequence[str]) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), pa.array(list(names), pa.string()))


def _consecutive(ids: np.ndarray) -> list[tuple[int, int]]:
    """Runs `[first, last)` of ids that follow each other."""
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(ids, cuts) if len(run)]


def _window_schema(pa: Any) -> Any:
    return pa.schema({
        "coder": pa.string(), "latent": pa.int32(), "kind": pa.string(), "rank": pa.int32(), "peak": pa.float32(),
        "peak_at": pa.int32(), "quantile": pa.int32(), "context": pa.int64(), "start": pa.int32(),
        "document": pa.int32(), "role": pa.string(), "tokens": pa.list_(pa.int64()), "strings": pa.list_(pa.string()),
        "activations": pa.list_(pa.float32()),
    }.items())  # fmt: skip


def _window_tables(
    coder: CoderIndex, ids: np.ndarray, kind: str, n: int, context: tuple[int, int], seed: int
) -> Iterator[dict[str, Any]]:
    """Windows of a few hundred latents at a time."""
    for start in range(0, len(ids), LATENTS):
        drawn = {i: coder[i].windows(kind, n, None, context, seed) for i in ids[start : start + LATENTS].tolist()}
        found = [(i, rank, window) for i, windows in drawn.items() for rank, window in enumerate(windows)]
        windows = [window for _, _, window in found]
        yield {
            "coder": [coder.name] * len(found), "latent": [i for i, _, _ in found], "kind": [kind] * len(found),
            "rank": [rank for _, rank, _ in found], "peak": [w.peak for w in windows],
            "peak_at": [w.peak_at for w in windows], "quantile": [w.quantile for w in windows],
            "context": [w.context_id for w in windows], "start": [w.start for w in windows],
            "document": [w.document for w in windows], "role": [w.role for w in windows],
            "tokens": [w.tokens for w in windows], "strings": [w.strings for w in windows],
            "activations": [w.values for w in windows],
        }  # fmt: skip
