"""What lies where in an index folder, and how its raw arrays are opened.

index.json            what was indexed: roles, context, token counts, coders, their segments, `meta`
vocab.json            display string of every token id (absent where the builder gave none)
tokens.bin            u16 or u32 [n_contexts, context]
documents.bin         i32 [n_contexts, context]   document id of every position
roles.bin             u8  [n_contexts]
mask.bin              packed bits [n_contexts, ceil(context / 8)], 1 = the position counts
slice-NAME.bin        u8  [n_contexts, context]   one for each slicing: which of its values a position belongs to
NAME/statistics/*.bin see `statistics.py`
NAME/segment-NNNNN/   the postings of a run of positions, with a manifest of their own: see `segment.py`
manifest.json         length and SHA-256 of all of these, written last
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import DTypeLike

from unmix.core.atomic import write_json
from unmix.core.errors import ConfigError, CorruptError, did_you_mean

KIND = "index"
INDEX_SCHEMA = 2
SEGMENT_TOKENS = 2**32
"""A segment covers fewer positions than this, so that a u32 can name each of them (decision 20)."""
MOST_FILES = 2**16
RESERVED = frozenset({"index.json", "vocab.json", "tokens.bin", "documents.bin", "roles.bin", "mask.bin"})

TOKENS, DOCUMENTS, ROLE_BYTES, MASK = "tokens.bin", "documents.bin", "roles.bin", "mask.bin"
POSITIONS, VALUES, OFFSETS = "positions.bin", "values.bin", "offsets.bin"

RoleFilter = str | Sequence[str] | None
"""One role, several, or None for all of them."""


@dataclass(frozen=True)
class Segment:
    """A run of token positions: `base` is its first global position, `tokens` its length."""

    base: int
    tokens: int


@dataclass(frozen=True)
class CoderEntry:
    """One coder of an index: its folder inside the index folder and its number of latents."""

    folder: str
    n_latents: int


@dataclass(frozen=True)
class IndexMeta:
    """The content of `index.json`."""

    roles: tuple[str, ...]
    context: int
    n_contexts: int
    token_dtype: str
    """`uint16` or `uint32`."""
    counted: tuple[int, ...]
    """Unmasked positions of each role."""
    coders: dict[str, CoderEntry]
    segments: tuple[Segment, ...]
    meta: dict[str, Any]
    """The builder's own facts: coder hashes, tokenizer name, source of the text …"""
    slices: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Slicings of the positions: name → names of its values, by number (`speaker`: user, assistant …; `label` …)."""
    schema: int = INDEX_SCHEMA

    @property
    def n_tokens(self) -> int:
        """All token positions, masked ones included."""
        return self.n_contexts * self.context

    def write(self, folder: Path) -> None:
        """Write `index.json`."""
        write_json(folder / "index.json", asdict(self))

    @classmethod
    def read(cls, folder: Path) -> IndexMeta:
        """Read `index.json`; `CorruptError` naming it where it is not what this version writes."""
        path = folder / "index.json"
        try:
            tree = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
            schema = tree["schema"]
            if schema != INDEX_SCHEMA:
                raise CorruptError(f"{path}: schema {schema!r}, this version reads {INDEX_SCHEMA}")
            coders = {name: CoderEntry(**entry) for name, entry in tree["coders"].items()}
            segments = tuple(Segment(**entry) for entry in tree["segments"])
            tree |= {"coders": coders, "segments": segments}
            tree |= {"roles": tuple(tree["roles"]), "counted": tuple(tree["counted"])}
            tree["slices"] = {name: tuple(values) for name, values in tree.get("slices", {}).items()}
            return cls(**tree)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(f"{path}: not an index description ({error!r})") from error


def slice_file(name: str) -> str:
    """File of a slicing inside the index folder."""
    return f"slice-{name}.bin"


def segment_folder(number: int) -> str:
    """Folder of a segment inside a coder's folder."""
    return f"segment-{number:05d}"


def open_raw(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only memory map of a raw array; `CorruptError` naming the file where its length is another."""
    kind = np.dtype(dtype)
    expected = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        shown = "no file" if found is None else f"{found} bytes"
        raise CorruptError(f"{path}: found {shown}, expected {expected} bytes")
    if expected == 0:
        return np.empty(shape, kind)
    try:
        return np.asarray(np.memmap(path, kind, "r", shape=shape))
    except OSError as error:
        # Each map holds a file open: 3 for a segment, so 26 coders of 16 segments pass the usual limit of 1024.
        if error.errno != errno.EMFILE or not _may_open_more():
            raise
        return np.asarray(np.memmap(path, kind, "r", shape=shape))


def _may_open_more() -> bool:
    """Raise this process's limit of open files as far as the system lets it; False where it is there already."""
    import resource  # absent on Windows, whose limit is another

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft >= wanted:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True


def write_raw(file: BinaryIO, array: np.ndarray) -> None:
    """Append an array's bytes. Unlike `ndarray.tofile`, a full disk is an error that says so."""
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def save_raw(path: Path, array: np.ndarray) -> None:
    """Write an array's bytes as a file of its own."""
    with path.open("wb") as file:
        write_raw(file, array)


def role_ids(roles: Sequence[str], wanted: RoleFilter) -> list[int] | None:
    """Numbers of the wanted roles, or None for all; `ConfigError` for a role that does not exist."""
    if wanted is None:
        return None
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in roles:
            raise ConfigError(f"unknown role {name!r}. {did_you_mean(name, roles)}")
    return sorted({roles.index(name) for name in names})


def plain_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON copy of the builder's facts; `ConfigError` where they are not JSON."""
    try:
        return cast("dict[str, Any]", json.loads(json.dumps(dict(meta), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"index meta must be plain JSON values: {error}") from error
