"""An index → a delphi cache, in the layout of delphi 0.1: its loaders, samplers and scorers read it as their own.

Postings lie latent by latent in an index and in order of row in a cache. Each file is turned round on disk: places
are counted, then filled by runs of latents, then each stretch of rows is put in order. Memory is bounded by the
budget, whatever the number of postings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from unmix.core.atomic import atomic_folder, disk_errors, write_json
from unmix.core.errors import ConfigError
from unmix.core.progress import task
from unmix.index.exchange.delphi_layout import EXTRA, LATENTS, THRESHOLD
from unmix.index.exchange.runs import latent_runs, open_postings, postings
from unmix.index.layout import DOCUMENTS, MASK, ROLE_BYTES, TOKENS, slice_file
from unmix.index.reader import CoderIndex, LatentIndex

BYTES_PER_POSTING = 96
"""Held for each posting of a run at the worst moment: positions and values, their order, what is written."""
DEFAULT_BUDGET = 2**30
LARGEST = 65504.0
_NAMES = {"uint16": "U16", "uint32": "U32", "int64": "I64", "float16": "F16"}


def write_delphi(
    index: LatentIndex,
    folder: str | Path,
    *,
    coders: Sequence[str] | None = None,
    splits: int = 5,
    tokens: bool = True,
    plain: bool = False,
    budget_bytes: int = DEFAULT_BUDGET,
) -> dict[str, int]:
    """Write a cache to a new folder; the number of postings left out, by coder.

    Values become float16 and those of at most 1e-5 are left out, as delphi does; masked positions are silent.

    Args:
        coders: which coders (default: all); each becomes a hook of its folder's name.
        splits: files a coder, over equal stretches of latents.
        tokens: keep the tokens in every file; without, delphi tokenises the data set of `config.json` anew.
        plain: leave out the folder `unmix/`, from which `read_delphi` knows documents, roles and token strings.

    Raises:
        ConfigError: more splits than latents, a folder that is not empty, values that float16 cannot hold.
    """
    folder = Path(folder)
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not empty; choose another folder")
    chosen = [index.coder(name) for name in (coders or index.names)]
    for coder in chosen:
        if not 1 <= splits <= coder.n_latents:
            raise ConfigError(f"splits is {splits}, expected 1 to {coder.n_latents} (the latents of {coder.name!r})")
        if float(coder.max.max()) > LARGEST:
            worst = int(coder.max.argmax())
            raise ConfigError(
                f"latent {worst} of {coder.name!r} reaches {coder.max[worst]:g}, and a delphi cache holds float16, "
                f"{LARGEST:g} at most"
            )
    dropped: dict[str, int] = {}
    total = sum(int(coder.figures.firings.sum()) for coder in chosen)
    with disk_errors(folder), atomic_folder(folder) as temp, task("export", total) as progress:
        for coder in chosen:
            hook = temp / LATENTS / index.description.coders[coder.name].folder
            hook.mkdir(parents=True)
            edges = np.linspace(0, coder.n_latents, splits + 1).astype(np.int64)
            dropped[coder.name] = 0
            for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                path = hook / f"{first}_{end - 1}.safetensors"
                writer = _SplitWriter(index, coder, first, end, budget_bytes // BYTES_PER_POSTING)
                dropped[coder.name] += writer.write(path, tokens)
                progress.advance(int(coder.figures.firings[first:end].sum()))
            write_json(hook / "config.json", _config(index, splits))
        if not plain:
            _write_extra(index, temp / EXTRA)
    return dropped


class _SplitWriter:
    """One file: latents `first` to `end` − 1, in order of row."""

    def __init__(self, index: LatentIndex, coder: CoderIndex, first: int, end: int, at_once: int) -> None:
        self.index, self.coder, self.first, self.end = index, coder, first, end
        self.store, self.at_once = open_postings(index, coder), max(at_once, 1)
        self.runs = latent_runs(coder.figures.firings[first:end], first, self.at_once)

    def write(self, path: Path, tokens: bool) -> int:
        """Write the file; the number of postings left out."""
        context, rows = self.index.context, self.index.n_contexts
        counts, seen = np.zeros(rows, np.int64), 0
        for positions, _, _ in self._kept():
            counts += np.bincount(positions // context, minlength=rows)
            seen += len(positions)
        used = np.flatnonzero(counts)
        small = self.end - self.first <= 2**16 and context <= 2**16 and (not len(used) or used[-1] < 2**16)
        kind = np.dtype(np.uint16 if small else np.uint32)
        shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "locations": (kind, (seen, 3)), "activations": (np.dtype(np.float16), (seen,)),
        }  # fmt: skip
        if tokens:
            shapes["tokens"] = (np.dtype(np.int64), (rows, context))
        with path.open("wb") as file:
            starts = _write_head(file, shapes)
            if tokens:
                file.seek(starts["tokens"])
                for start in range(0, rows, 4096):
                    file.write(self.index.tokens[start : start + 4096].astype("<i8").tobytes())
        if seen:
            locations = np.memmap(path, kind, "r+", starts["locations"], (seen, 3))
            activations = np.memmap(path, np.float16, "r+", starts["activations"], (seen,))
            self._fill(locations, activations, np.concatenate([[0], np.cumsum(counts)]))
            locations.flush()
            activations.flush()
        return int(self.coder.figures.firings[self.first : self.end].sum()) - seen

    def _kept(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Global positions, latents − first and values of each run, in order of position."""
        for first, last in self.runs:
            latents, positions, values = postings(self.store, first, last)
            keep = np.flatnonzero(np.abs(values) > THRESHOLD)
            keep = keep[np.argsort(positions[keep], kind="stable")]
            yield positions[keep], latents[keep] - self.first, values[keep]

    def _fill(self, locations: np.ndarray, activations: np.ndarray, offsets: Int64[np.ndarray, " rows_plus_1"]) -> None:
        context, free = self.index.context, offsets[:-1].copy()
        for positions, latents, values in self._kept():
            rows = positions // context
            new = np.bincount(rows, minlength=len(free))
            place = np.arange(len(rows)) + np.repeat(free - (np.cumsum(new) - new), new)
            locations[place] = np.stack([rows, positions - rows * context, latents], axis=1)
            activations[place] = values.astype(np.float16)
            free += new
        if len(self.runs) > 1:
            self._order(locations, activations, offsets)

    def _order(self, locations: np.ndarray, activations: np.ndarray, offsets: np.ndarray) -> None:
        """Inside each row: by position, then by latent; the runs left them one behind the other."""
        for first, last in latent_runs(np.diff(offsets), 0, self.at_once):
            cut = slice(int(offsets[first]), int(offsets[last]))
            part, values = np.asarray(locations[cut]), np.asarray(activations[cut])
            order = np.lexsort((part[:, 2], part[:, 1], part[:, 0]))
            locations[cut], activations[cut] = part[order], values[order]


def _write_head(file: BinaryIO, shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, int]:
    """The header of a safetensors file, the widest numbers first, and the file's length; where each tensor begins."""
    entries, end = dict[str, Any](), 0
    for name, (kind, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
        span = [end, end + int(np.prod(shape, dtype=np.int64)) * kind.itemsize]
        entries[name] = {"dtype": _NAMES[kind.name], "shape": list(shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
    if end and hasattr(os, "posix_fallocate"):
        # A memory map of a file with holes dies of a full disk; this says so first.
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in entries.items()}


def _config(index: LatentIndex, splits: int) -> dict[str, Any]:
    """delphi's `config.json`; what an index does not know of the data set is empty."""
    kept = index.meta.get("delphi")
    known: dict[str, Any] = next(iter(kept.values()), {}) if isinstance(kept, dict) else {}
    model = index.meta.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    return {
        "dataset_repo": str(index.meta.get("source") or ""), "dataset_split": "", "dataset_name": "",
        "dataset_column": "text", "batch_size": 1, "model_name": name or "", **known,
        "cache_ctx_len": index.context, "n_tokens": index.n_tokens, "n_splits": splits,
    }  # fmt: skip


def _write_extra(index: LatentIndex, folder: Path) -> None:
    """What a cache has no place for: documents, roles, masks, slices and token strings, as the index keeps them."""
    folder.mkdir()
    kept = [TOKENS, DOCUMENTS, ROLE_BYTES, MASK, "index.json", *map(slice_file, index.description.slices)]
    for name in (*kept, "vocab.json"):
        if (index.folder / name).is_file():
            shutil.copyfile(index.folder / name, folder / name)
