"""Walks the stages of a run: skips what is done, redoes what its inputs changed, goes on where it was stopped."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unmix._version import __version__
from unmix.core.atomic import write_json, write_text
from unmix.core.config import semantic_dict, semantic_hash
from unmix.core.errors import ConfigError, ResumeError, did_you_mean
from unmix.core.lock import folder_lock
from unmix.core.progress import clock
from unmix.run.config import RUN_FILE, RunConfig
from unmix.run.context import RunContext

log = logging.getLogger("unmix")
SCHEMA = 1
STAMPS = ".stages"


@dataclass(frozen=True)
class Stage:
    """One step of a run: what it depends on, and what it does."""

    name: str
    work: Callable[[RunContext], None]
    semantic: Callable[[RunConfig], list[Any]]
    """Config parts that change its result."""
    after: tuple[str, ...] = ()
    """Stages whose results it reads."""
    precious: bool = False
    """Costly: never redone over an older result without being asked."""
    scratch: bool = False
    """Its result only feeds later stages, and may be gone once they are done."""
    check: Callable[[RunContext], None] | None = None
    """What can be refused before any stage begins; asked only where this one is still to be done."""


@dataclass
class Walk:
    """What a walk did: seconds a stage, and which were found done."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=lambda: {})
    skipped: list[str] = field(default_factory=lambda: [])


def stage_keys(stages: Sequence[Stage], config: RunConfig) -> dict[str, str]:
    """Key of every stage: the hash of its semantic fields and of the keys it reads (decision 15)."""
    keys: dict[str, str] = {}
    for stage in stages:
        keys[stage.name] = semantic_hash(stage.name, *stage.semantic(config), *[keys[name] for name in stage.after])
    return keys


def walk(
    config: RunConfig, stages: Sequence[Stage], until: str | None = None, redo: Sequence[str] = ()
) -> tuple[RunContext, Walk]:
    """Run every stage up to `until` (default: all) in `config.out`, under the folder's lock.

    Raises `ResumeError` where a precious stage was made by another config and `redo` does not name it, and whatever
    the checks of the stages to be done refuse.
    """
    names = [stage.name for stage in stages]
    for name in [*redo, *([until] if until else [])]:
        if name not in names:
            raise ConfigError(f"no stage {name!r}. {did_you_mean(name, names)}")
    if config.out is None:
        raise ConfigError("out: a run needs a folder")
    folder = config.out
    todo = stages[: names.index(until) + 1] if until else stages
    keys = stage_keys(stages, config)
    with folder_lock(folder):
        context = RunContext(config, folder, keys, redo)
        _refuse_overwrite(folder, config, todo, keys, redo)
        for stage in todo:
            if stage.check is not None and not _done(folder, stage, keys, redo):
                stage.check(context)
        _write_run_file(folder, config)
        result = Walk(folder)
        for i, stage in enumerate(todo):
            if _done(folder, stage, keys, redo) or _spared(folder, stage, todo[i + 1 :], keys, redo):
                result.skipped.append(stage.name)
                continue
            began = time.monotonic()
            log.info("%s: started (%d of %d)", stage.name, i + 1, len(todo))
            stage.work(context)
            seconds = time.monotonic() - began
            result.seconds[stage.name] = seconds
            stamp = {"schema": SCHEMA, "key": keys[stage.name], "seconds": round(seconds, 1), "version": __version__}
            write_json(folder / STAMPS / f"{stage.name}.json", stamp)
            log.info("%s: done in %s", stage.name, clock(seconds))
        return context, result


def stamp_of(folder: Path, name: str) -> dict[str, Any] | None:
    """What a finished stage left, or None; its key is null where its result is gone since.

    `ResumeError` for a stamp of another schema.
    """
    path = folder / STAMPS / f"{name}.json"
    if not path.is_file():
        return None
    stamp = json.loads(path.read_text(encoding="utf-8"))
    if stamp.get("schema") != SCHEMA:
        raise ResumeError(f"{path}: schema {stamp.get('schema')!r}, this version reads {SCHEMA}")
    return stamp


def forget(folder: Path, name: str) -> None:
    """Take back that a stage is done, since its result is about to go; what it took stays on record."""
    stamp = stamp_of(folder, name)
    if stamp is not None:
        write_json(folder / STAMPS / f"{name}.json", {**stamp, "key": None, "was": stamp["key"]})


def _done(folder: Path, stage: Stage, keys: dict[str, str], redo: Sequence[str]) -> bool:
    stamp = stamp_of(folder, stage.name)
    return stamp is not None and stamp["key"] == keys[stage.name] and stage.name not in redo


def _spared(folder: Path, stage: Stage, later: Sequence[Stage], keys: dict[str, str], redo: Sequence[str]) -> bool:
    """Whether a scratch stage feeds only stages that are done already."""
    readers = [other for other in later if stage.name in other.after]
    return stage.scratch and bool(readers) and all(_done(folder, other, keys, redo) for other in readers)


def _refuse_overwrite(
    folder: Path, config: RunConfig, todo: Sequence[Stage], keys: dict[str, str], redo: Sequence[str]
) -> None:
    for stage in todo:
        stamp = stamp_of(folder, stage.name)
        if stage.precious and stamp is not None and stamp["key"] != keys[stage.name] and stage.name not in redo:
            raise ResumeError(
                f"{folder}: stage {stage.name!r} was made by another config ({changes(folder, config)}); "
                f"choose another --out, or say --redo {stage.name} to replace it"
            )


def changes(folder: Path, config: RunConfig) -> str:
    """The semantic fields in which `config` differs from the run file in `folder`."""
    path = folder / RUN_FILE
    if not path.is_file():
        return "its run file is gone"
    old = RunConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    before, now = _flat(semantic_dict(old)), _flat(semantic_dict(config))
    parts = [
        f"{key}: {before.get(key)!r} → {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    return "; ".join(parts[:6]) or "the same fields, another version or text"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _write_run_file(folder: Path, config: RunConfig) -> None:
    tree = config.model_dump(mode="json", exclude={"out"})
    write_text(folder / RUN_FILE, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
