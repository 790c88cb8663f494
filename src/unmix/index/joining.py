"""`join`: parts of one build become its index; finished indexes over different text become one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from unmix.core.atomic import disk_errors, write_json
from unmix.core.errors import ConfigError, CorruptError, ResumeError
from unmix.core.manifest import MANIFEST, verify_folder
from unmix.index.building import finish
from unmix.index.checks import check_place
from unmix.index.claims import BuildLock
from unmix.index.damage import BUILD, shown
from unmix.index.frame import Frame
from unmix.index.layout import DOCUMENTS, TOKENS, IndexMeta, Segment, open_raw, segment_folder, slice_file, write_raw
from unmix.index.plan import PLAN, Plan, differences
from unmix.index.reader import LatentIndex, open_index
from unmix.index.sealing import VOCAB, describe, link, link_folder, new_index, seal
from unmix.index.shards import (
    GROUP,
    SHARD,
    building_folder,
    drop_broken,
    group_folder,
    group_stands,
    missing,
    shard_folder,
    shard_stands,
    whole,
)
from unmix.index.writer import DEFAULT_BUDGET

ROWS = 2**16
SHOWN = 12


def join(folder: str | Path, parts: Sequence[str | Path], *, budget_bytes: int = DEFAULT_BUDGET) -> LatentIndex:
    """One index of several parts; they are left as they are.

    Args:
        folder: where the index shall be.
        parts: either the places of one build's parts (what `--out` said, or `.NAME.building` itself), or indexes of
            the same coders over different text: their documents are numbered on, their statistics derived anew.
        budget_bytes: memory for postings.

    Raises:
        ConfigError: no parts, or ones that do not go together; missing shards are named.
        ResumeError: parts of builds with different inputs, each named; another process builds at `folder`.
        CorruptError: an index with a wrong hash somewhere, named.
    """
    folder = Path(folder)
    check_place(folder)
    if not parts:
        raise ConfigError("nothing to join: give the parts of a build, or indexes")
    buildings = [_building_at(Path(part)) for part in parts]
    unfinished = [place for place in buildings if place is not None]
    if len(unfinished) == len(parts):
        return _join_parts(folder, unfinished, budget_bytes)
    if unfinished:
        raise ConfigError(f"{unfinished[0]}: is part of a build, and others given are whole indexes; join one kind")
    return _join_indexes(folder, [open_index(part) for part in parts], budget_bytes)


def _building_at(place: Path) -> Path | None:
    """The building folder that `place` is or stands for; None for a finished index."""
    if (place / PLAN).is_file():
        return place
    if not (place / MANIFEST).is_file() and (building_folder(place) / PLAN).is_file():
        return building_folder(place)
    return None


def _join_parts(folder: Path, parts: Sequence[Path], budget_bytes: int) -> LatentIndex:
    plan = Plan.read(parts[0])
    for other in parts[1:]:
        found = Plan.read(other)
        if found.key != plan.key:
            raise ResumeError(
                f"{parts[0]} and {other} are parts of different builds: "
                f"{'; '.join(differences(plan.decides, found.decides))}"
            )
    building = building_folder(folder)
    with BuildLock(building) as lock:
        if not lock.alone():
            raise lock.refusal()
        if not (building / PLAN).is_file():
            for name in (PLAN, VOCAB):
                if (parts[0] / name).is_file():
                    shutil.copyfile(parts[0] / name, building / name)
        elif (here := Plan.read(building)).key != plan.key:
            raise ResumeError(f"{building}: is another build: {'; '.join(differences(here.decides, plan.decides))}")
        drop_broken(building, plan, range(plan.cut.n_shards))
        for part in parts:
            if part.resolve() != building.resolve():
                _take(building, plan, part)
        if absent := missing(building, plan):
            raise ConfigError(
                f"{folder}: {len(absent)} of {plan.cut.n_shards} shards are in none of the parts: {_listed(absent)}"
            )
        finish(folder, budget_bytes)
        shutil.rmtree(building, ignore_errors=True)
    return open_index(folder)


def _take(building: Path, plan: Plan, part: Path) -> None:
    """Link the whole shards and groups of a part that are not here yet."""
    for number in range(plan.cut.n_groups):
        source = group_folder(part, number)
        if not group_stands(building, number) and source.is_dir() and whole(source, GROUP, plan.group_key(number)):
            _link_tree(source, group_folder(building, number))
    for number in range(plan.cut.n_shards):
        source = shard_folder(part, number)
        if (
            not shard_stands(building, plan, number)
            and source.is_dir()
            and whole(source, SHARD, plan.shard_key(number))
        ):
            _link_tree(source, shard_folder(building, number))


def _link_tree(source: Path, target: Path) -> None:
    """Every file below a folder, the manifest last: without it the folder is not there."""
    shutil.rmtree(target, ignore_errors=True)
    files = sorted((f for f in source.rglob("*") if f.is_file()), key=lambda f: f == source / MANIFEST)
    for file in files:
        link(file, target / file.relative_to(source))


def _listed(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:SHOWN]))
    return text if len(numbers) <= SHOWN else f"{text} and {len(numbers) - SHOWN} more"


def _join_indexes(folder: Path, indexes: Sequence[LatentIndex], budget_bytes: int) -> LatentIndex:
    frame = _common(indexes)
    for index in indexes:
        _require_whole(index.folder)
    segments: list[Segment] = []
    with new_index(folder) as temp, disk_errors(folder):
        _join_tokens(temp, frame, indexes)
        base = 0
        for index in indexes:
            for number, segment in enumerate(index.description.segments):
                moved = Segment(base + segment.base, segment.tokens)
                for name, home in frame.folders.items():
                    source = index.folder / index.description.coders[name].folder / segment_folder(number)
                    _move_segment(source, temp / home / segment_folder(len(segments)), moved.base)
                segments.append(moved)
            base += index.n_tokens
        metas = [index.meta for index in indexes]
        same = {k: v for k, v in metas[0].items() if k != BUILD and all(meta.get(k) == v for meta in metas)}
        meta = same | {
            "joined": [{"hash": index.hash, "n_tokens": index.n_tokens, "meta": index.meta} for index in indexes]
        }
        seal(temp, describe(temp, frame, base // frame.context, segments, meta), indexes[0].store.vocab, budget_bytes)
    return open_index(folder)


def _require_whole(folder: Path) -> None:
    """`CorruptError` where an index is broken: what is joined gets hashes anew, which would call it whole."""
    if problems := verify_folder(folder):
        raise CorruptError(f"{folder}: cannot be joined: {'; '.join(shown(folder, problems)[:SHOWN])}")


def _move_segment(source: Path, target: Path, base: int) -> None:
    """A segment at another base: its files count from it, so only the manifest says another number."""
    link_folder(source, target)
    manifest = cast("dict[str, Any]", json.loads((source / MANIFEST).read_text(encoding="utf-8")))
    (target / MANIFEST).unlink()
    write_json(target / MANIFEST, manifest | {"base": base})


def _common(indexes: Sequence[LatentIndex]) -> Frame:
    """What the indexes share; `ConfigError` naming what does not go together."""
    first = indexes[0]
    for other in indexes[1:]:
        pairs = {
            "context": (first.context, other.context),
            "roles": (list(first.roles), list(other.roles)),
            "coders": (_sizes(first.description), _sizes(other.description)),
            "coder_hash": (first.meta.get("coder_hash"), other.meta.get("coder_hash")),
            "model": (first.meta.get("model"), other.meta.get("model")),
            "slicings": (sorted(first.description.slices), sorted(other.description.slices)),
        }
        for what, (a, b) in pairs.items():
            if a != b:
                raise ConfigError(f"{first.folder} and {other.folder} cannot be joined: {what} {a} and {b}")
        if first.store.vocab != other.store.vocab:
            raise ConfigError(f"{first.folder} and {other.folder} cannot be joined: their vocabularies differ")
    slices = {
        name: tuple(dict.fromkeys(value for index in indexes for value in index.description.slices[name]))
        for name in first.description.slices
    }
    small = all(index.description.token_dtype == "uint16" for index in indexes)
    return Frame(_sizes(first.description), first.context, first.roles, slices, 2**16 if small else None)


def _sizes(description: IndexMeta) -> dict[str, int]:
    return {name: entry.n_latents for name, entry in description.coders.items()}


def _join_tokens(temp: Path, frame: Frame, indexes: Sequence[LatentIndex]) -> None:
    """Token files one after the other; documents numbered on, values of slicings by their common numbers."""
    offset = 0
    with disk_errors(temp):
        for name in frame.token_files:
            (temp / name).touch()
        for index in indexes:
            shape, store = (index.n_contexts, index.context), index.store
            highest = offset
            tables = {
                name: np.array([list(values).index(value) for value in index.description.slices[name]], np.uint8)
                for name, values in frame.slices.items()
            }
            plain = [n for n in frame.token_files if n not in (DOCUMENTS, *map(slice_file, frame.slices))]
            for first in range(0, index.n_contexts, ROWS):
                part = slice(first, first + ROWS)
                documents = store.documents[part].astype(np.int64) + offset
                highest = max(highest, int(documents.max(initial=offset)) + 1)
                if highest > 2**31:
                    raise ConfigError(f"{index.folder}: its documents would be numbered past 2^31; join fewer indexes")
                _append(temp / DOCUMENTS, documents.astype(np.int32))
                for name, table in tables.items():
                    _append(temp / slice_file(name), table[store.slices[name][part]])
            for name in plain:
                _append_plain(temp / name, index, name, frame, shape)
            offset = highest


def _append_plain(path: Path, index: LatentIndex, name: str, frame: Frame, shape: tuple[int, int]) -> None:
    dtype = np.dtype(index.description.token_dtype) if name == TOKENS else np.dtype(np.uint8)
    size = (index.folder / name).stat().st_size // dtype.itemsize
    stored = open_raw(index.folder / name, dtype, (size,))
    target = frame.token_dtype if name == TOKENS else dtype
    for first in range(0, size, ROWS * 64):
        _append(path, stored[first : first + ROWS * 64].astype(target, copy=False))


def _append(path: Path, array: np.ndarray) -> None:
    with path.open("ab") as file:
        write_raw(file, array)
