"""`build`: from a source to an index, by any number of processes, in spite of anything that stops them.

Work happens in `.NAME.building/` beside the index (see `shards.py`): shards and groups are whole or absent, keyed by
everything that decides their bytes; what is missing is built, the rest is kept. The index takes its place in one
step, and the building folder goes then.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from unmix.core.atomic import disk_errors, write_json
from unmix.core.errors import ConfigError, CorruptError, ResumeError, did_you_mean
from unmix.core.manifest import MANIFEST
from unmix.core.progress import task
from unmix.index.checks import check_place
from unmix.index.claims import BuildLock
from unmix.index.damage import BUILD
from unmix.index.groups import append, close_group
from unmix.index.layout import IndexMeta, segment_folder
from unmix.index.plan import PLAN, Plan, differences, plan_of
from unmix.index.reader import LatentIndex, open_index
from unmix.index.sealing import LOCK, VOCAB, describe, link_folder, new_index, seal
from unmix.index.shards import building_folder, drop_broken, group_folder, missing
from unmix.index.sources.base import Open, Source
from unmix.index.working import Work, work
from unmix.index.writer import DEFAULT_BUDGET

log = logging.getLogger("unmix")
ENGINES = ("processes", "ray")


def build(
    folder: str | Path,
    open_source: Open,
    *,
    budget_bytes: int = DEFAULT_BUDGET,
    workers: int = 1,
    engine: str = "processes",
    part: tuple[int, int] | None = None,
    restart: bool = False,
) -> LatentIndex | None:
    """Build the index of a source, or go on where an earlier call was stopped; an index of these inputs is kept.

    Args:
        folder: where the index shall be; an older index of other inputs is replaced when this one is whole.
        open_source: opens the source; with several workers each calls it, so it must be picklable.
        budget_bytes: memory for postings, all workers and coders together.
        workers: processes (of this machine, or of the Ray cluster).
        engine: "processes" or "ray".
        part: `(i, n)`: only shards i, i + n, i + 2n …, for jobs on machines that share the folder or not.
        restart: throw away what an earlier call left, and build even where the index is there.

    Returns:
        The index, or None where shards of other parts are missing: see `joining.join`.

    Raises:
        ResumeError: another process builds here, or what lies here was begun with other inputs, each named.
        MachineError: the disk is too small, with both numbers, or full; a worker dies again and again.
    """
    folder = Path(folder)
    _check(budget_bytes, workers, engine, part)
    check_place(folder, replaced=False)
    source = open_source()
    plan = plan_of(source)
    if not restart and (found := _finished(folder, plan)) is not None:
        return found
    check_place(folder)
    building = building_folder(folder)
    numbers = range(plan.cut.n_shards) if part is None else range(part[0], plan.cut.n_shards, part[1])
    with BuildLock(building) as lock:
        _begin(lock, building, plan, source.vocab, restart, shared=part is not None)
        here = source if workers == 1 and engine == ENGINES[0] else None
        del source  # a model that only other processes need is not kept here
        _run(building, plan, numbers, open_source, here, (budget_bytes, workers, engine, part))
        del here
        if missing(building, plan) or (part is not None and not _alone(lock)):
            return None
        if part is not None:
            drop_broken(building, plan, set(range(plan.cut.n_shards)).difference(numbers))
        stands = not missing(building, plan)  # another part may have ended the build since
        found = None if restart and stands else _finished(folder, plan)
        if found is None and stands:
            finish(folder, budget_bytes, workers if engine == ENGINES[0] else 1)
            found = open_index(folder)
        if found is not None:
            shutil.rmtree(building, ignore_errors=True)
    return found


def finish(folder: Path, budget_bytes: int, workers: int = 1) -> None:
    """Put the index of a building folder whose shards are all there in its place. Needs no source.

    Whoever calls holds the building's lock alone.
    """
    building = building_folder(folder)
    plan = Plan.read(building)
    frame = plan.frame
    for number in range(plan.cut.n_groups):
        while not close_group(building, plan, number, budget_bytes):
            if absent := missing(building, plan, plan.cut.shards(number)):
                raise CorruptError(f"{building}: shards {absent} are gone; the same command builds them again")
            time.sleep(0.1)
    groups = [group_folder(building, number) for number in range(plan.cut.n_groups)]
    with new_index(folder) as temp, disk_errors(folder):
        for name in frame.token_files:
            append([group / name for group in groups], temp / name)
        for home in frame.folders.values():
            for number, group in enumerate(groups):
                link_folder(group / home, temp / home / segment_folder(number))
        meta = plan.meta | {BUILD: {"key": plan.key, "inputs": plan.decides}}
        description = describe(temp, frame, plan.cut.n_contexts, plan.cut.segments, meta)
        seal(temp, description, _vocab(building), budget_bytes, workers)


def _check(budget_bytes: int, workers: int, engine: str, part: tuple[int, int] | None) -> None:
    if budget_bytes < 1:
        raise ConfigError(f"budget_bytes is {budget_bytes}, expected at least 1")
    if workers < 1:
        raise ConfigError(f"workers is {workers}, expected at least 1")
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}. {did_you_mean(engine, ENGINES)}")
    if part is not None and not 0 <= part[0] < part[1]:
        raise ConfigError(f"part is {part[0]}/{part[1]}, expected 0/{part[1]} to {part[1] - 1}/{part[1]}")


def _finished(folder: Path, plan: Plan) -> LatentIndex | None:
    """The index of these inputs, where it is there; what a killed build left beside it goes."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        built = IndexMeta.read(folder).meta.get(BUILD)
        found = open_index(folder) if isinstance(built, dict) and built.get("key") == plan.key else None
    except CorruptError:
        return None
    if found is not None:
        (folder / LOCK).unlink(missing_ok=True)
        _remove_left(building_folder(folder), plan)
    return found


def _remove_left(building: Path, plan: Plan) -> None:
    """Remove what a killed build of these inputs left; not one of other inputs, which may hold hours of work."""
    if not building.is_dir():
        return
    with BuildLock(building) as lock:
        if not lock.alone():
            return
        try:
            mine = not (building / PLAN).is_file() or Plan.read(building).key == plan.key
        except CorruptError:
            mine = False
        if mine:
            shutil.rmtree(building, ignore_errors=True)


def _begin(
    lock: BuildLock, building: Path, plan: Plan, vocab: Sequence[str] | None, restart: bool, shared: bool
) -> None:
    """Take the lock and make or check the building folder."""
    alone = lock.alone_or_shared() if shared else lock.alone()
    if not alone and (restart or not shared):
        raise lock.refusal()
    if restart:
        _empty(building)
    if (building / PLAN).is_file():
        _refuse_other(building, plan)
    elif vocab is not None:
        write_json(building / VOCAB, list(vocab), indent=None)
    plan.write(building)
    if shared and alone:
        lock.share()


def _refuse_other(building: Path, plan: Plan) -> None:
    before = Plan.read(building)
    if before.key != plan.key:
        changed = "; ".join(differences(before.decides, plan.decides))
        raise ResumeError(
            f"{building}: was begun with other inputs: {changed}. Give the same ones to go on, or begin anew with "
            "restart=True (--restart)"
        )


def _empty(building: Path) -> None:
    for entry in building.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _run(
    building: Path,
    plan: Plan,
    numbers: range,
    open_source: Open,
    source: Source | None,
    options: tuple[int, int, str, tuple[int, int] | None],
) -> None:
    """Build the shards that are missing."""
    budget_bytes, workers, engine, part = options
    drop_broken(building, plan, numbers)
    todo = missing(building, plan, numbers)
    if not todo:
        return
    workers = min(workers, len(todo))
    threads = max((os.cpu_count() or 1) // workers, 1) if workers > 1 else None
    parts = None if part is None else part[1]
    # Processes of a cluster need not run where this one does.
    place = building.resolve() if engine == "ray" else building
    job = Work(place, tuple(todo), max(budget_bytes // workers, 1), workers, parts, threads)
    tokens = {number: _tokens(plan, number) for number in numbers}
    total, left = sum(tokens.values()), sum(tokens[number] for number in todo)
    if left < total:
        log.info("index: %d of %d shards are there already", len(numbers) - len(todo), len(numbers))
    with task("index", total, done=total - left) as progress:
        if engine == "ray":
            from unmix.index.engines.ray import run

            run(job, open_source, lambda number: progress.advance(tokens[number]))
        elif workers > 1:
            from unmix.index.engines.processes import run

            run(job, open_source, lambda number: progress.advance(tokens[number]))
        else:
            work(job, open_source, source, done=lambda number: progress.advance(tokens[number]))


def _tokens(plan: Plan, number: int) -> int:
    first, last = plan.cut.contexts(number)
    return (last - first) * plan.cut.context


def _alone(lock: BuildLock) -> bool:
    """Whether this part is the last one at work: it puts the index in place then."""
    lock.release()
    return lock.alone()


def _vocab(building: Path) -> list[str] | None:
    path = building / VOCAB
    return cast("list[str]", json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
