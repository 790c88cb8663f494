"""One shard: a fixed range of contexts, encoded, checked and sorted, in a folder that is whole or absent.

plan.json                       what is built
vocab.json                      display strings, where the source has them
shards/NNNNN/                   token files, NAME/run-NNNNN/ (see `runs.py`), manifest.json with the shard's key
groups/NNNNN/                   the same of several shards as one segment: token files, NAME/ a segment, manifest.json
claims/                         one file a shard or group, locked by the process that works on it
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from unmix.core.atomic import atomic_folder, sweep
from unmix.core.errors import CorruptError, DataError
from unmix.core.manifest import MANIFEST, read_manifest, verify_folder, write_manifest
from unmix.index.claims import claim
from unmix.index.frame import Taken
from unmix.index.intake import Intake
from unmix.index.plan import Plan
from unmix.index.sources.base import Source

log = logging.getLogger("unmix")
SHARD, GROUP = "index-shard", "index-group"


def building_folder(folder: Path) -> Path:
    """Where the index that shall be at `folder` is built."""
    return folder.parent / f".{folder.name}.building"


def shard_folder(building: Path, number: int) -> Path:
    """A shard's folder."""
    return building / "shards" / f"{number:05d}"


def group_folder(building: Path, number: int) -> Path:
    """A group's folder."""
    return building / "groups" / f"{number:05d}"


def shard_claim(building: Path, number: int) -> Path:
    """The file that whoever builds a shard holds."""
    return building / "claims" / f"shard-{number:05d}"


def group_claim(building: Path, number: int) -> Path:
    """The file that whoever merges a group holds."""
    return building / "claims" / f"group-{number:05d}"


def group_stands(building: Path, number: int) -> bool:
    """Whether a group is there; it is whole then, but for bit rot."""
    return (group_folder(building, number) / MANIFEST).is_file()


def shard_stands(building: Path, plan: Plan, number: int) -> bool:
    """Whether a shard, or the group that it went into, is there."""
    there = (shard_folder(building, number) / MANIFEST).is_file()
    return there or group_stands(building, number // plan.cut.group)


def missing(building: Path, plan: Plan, numbers: Iterable[int] | None = None) -> list[int]:
    """The shards that are still to be built."""
    wanted = range(plan.cut.n_shards) if numbers is None else numbers
    return [number for number in wanted if not shard_stands(building, plan, number)]


def drop_broken(building: Path, plan: Plan, numbers: Iterable[int]) -> None:
    """Remove, of these shards and their groups, those with another key or whose hashes are wrong."""
    shards = list(numbers)
    for group in sorted({number // plan.cut.group for number in shards}):
        _drop(group_folder(building, group), GROUP, plan.group_key(group), group_claim(building, group))
    for number in shards:
        _drop(shard_folder(building, number), SHARD, plan.shard_key(number), shard_claim(building, number))


def _drop(folder: Path, kind: str, key: str, held: Path) -> None:
    if not folder.exists():
        return
    with claim(held) as mine:
        if mine and not whole(folder, kind, key):
            log.info("%s: is not whole or of another build; it is made again", folder)
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)


def whole(folder: Path, kind: str, key: str) -> bool:
    """Whether a folder has the right key and every file its hash."""
    try:
        return read_manifest(folder, kind).get("key") == key and not verify_folder(folder)
    except (CorruptError, FileNotFoundError, KeyError, TypeError, AttributeError):
        return False  # also where another process removes the shard meanwhile, whose group stands now


def build_shard(
    building: Path,
    plan: Plan,
    number: int,
    source: Source,
    budget_bytes: int,
    seen: Callable[[Taken], None] = lambda taken: None,
) -> None:
    """Make one shard of the source's batches. Whoever calls holds its claim. `seen` is called with every batch.

    Raises:
        DataError: the source gave another number of contexts than it was asked for.
        ConfigError, NonFiniteError: as `Frame.take`.
    """
    first, last = plan.cut.contexts(number)
    place = shard_folder(building, number)
    sweep(place)
    with atomic_folder(place) as temp:
        done = first
        base = first * plan.cut.context
        with Intake(temp, plan.frame, budget_bytes, temp, base) as intake:
            for batch in source.batches(first, last):
                taken = plan.frame.take(batch, done * plan.cut.context)
                seen(taken)
                if done + len(taken) <= last:
                    intake.add(taken, done)
                done += len(taken)
            intake.end_shard(base, temp)
        if done != last:
            raise DataError(f"the source gave {done - first} contexts for {first} to {last}, expected {last - first}")
        write_manifest(temp, SHARD, key=plan.shard_key(number))
