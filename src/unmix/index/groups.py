"""A group of shards → one segment of every coder and the token files of its contexts; the shards go then."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from unmix.core.atomic import atomic_folder, sweep
from unmix.core.manifest import MANIFEST, write_manifest
from unmix.index.claims import claim
from unmix.index.intake import runs_of
from unmix.index.merge import merge_runs
from unmix.index.plan import Plan
from unmix.index.shards import GROUP, drop_broken, group_claim, group_folder, group_stands, shard_folder, shard_stands

COPIED = 16 * 2**20


def close_group(building: Path, plan: Plan, number: int, budget_bytes: int, check: bool = False) -> bool:
    """Merge a group whose shards are all there, unless another process does; whether it stands now.

    With `check`, for shards that this process has not proved, a broken one is removed and not merged.
    """
    if not group_stands(building, number):
        if not all(shard_stands(building, plan, shard) for shard in plan.cut.shards(number)):
            return False
        with claim(group_claim(building, number)) as mine:
            if not mine:
                return False
            if not group_stands(building, number):
                shards = plan.cut.shards(number)
                if check:
                    drop_broken(building, plan, shards)
                if not all(shard_stands(building, plan, shard) for shard in shards):
                    return False
                merge_group(building, plan, number, budget_bytes)
    drop_shards(building, plan, number)
    return True


def merge_group(building: Path, plan: Plan, number: int, budget_bytes: int) -> None:
    """Make a group's folder of its shards, all of which are whole. Whoever calls holds its claim."""
    place = group_folder(building, number)
    sweep(place)
    shards = [shard_folder(building, shard) for shard in plan.cut.shards(number)]
    with atomic_folder(place) as temp:
        fill_group(temp, plan, number, shards, budget_bytes)


def fill_group(folder: Path, plan: Plan, number: int, shards: Sequence[Path], budget_bytes: int) -> None:
    """Write into `folder` what a group holds."""
    frame, numbers = plan.frame, plan.cut.shards(number)
    segment = plan.cut.segments[number]
    for name in frame.token_files:
        append([shard / name for shard in shards], folder / name)
    for coder, home in frame.folders.items():
        n = frame.latents[coder]
        runs = [
            run
            for shard, i in zip(shards, numbers, strict=True)
            for run in runs_of(shard / home, plan.cut.contexts(i)[0] * frame.context, n)
        ]
        merge_runs(folder / home, segment, runs, n, budget_bytes)
    files = [*frame.token_files, *(f"{home}/{MANIFEST}" for home in frame.folders.values())]
    write_manifest(folder, GROUP, files, key=plan.group_key(number))


def drop_shards(building: Path, plan: Plan, number: int) -> None:
    """Remove the shards of a group that stands."""
    for shard in plan.cut.shards(number):
        shutil.rmtree(shard_folder(building, shard), ignore_errors=True)


def append(pieces: Sequence[Path], target: Path) -> None:
    """The pieces' bytes, one after the other, as a new file."""
    with target.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, out, COPIED)
