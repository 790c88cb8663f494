"""`repair`: rebuilds only what is broken in an index, and puts back only what has the hash that it had before."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unmix.core.atomic import atomic_file, atomic_folder, sha256_file, sweep, write_json
from unmix.core.errors import ConfigError, CorruptError, ResumeError
from unmix.core.lock import folder_lock
from unmix.core.manifest import MANIFEST, Problem, read_manifest, verify_folder
from unmix.index.damage import BUILD, STATISTICS, Damage, damage_of, shown
from unmix.index.derive import derive
from unmix.index.groups import append, fill_group
from unmix.index.layout import KIND, IndexMeta, segment_folder
from unmix.index.plan import Plan, differences, plan_of
from unmix.index.sealing import VOCAB
from unmix.index.shards import build_shard, shard_folder
from unmix.index.sources.base import Open, Source
from unmix.index.writer import DEFAULT_BUDGET

log = logging.getLogger("unmix")


def repair(
    folder: str | Path,
    open_source: Open | Callable[[dict[str, Any]], Open] | None = None,
    *,
    budget_bytes: int = DEFAULT_BUDGET,
) -> list[str]:
    """Mend an index: statistics from its postings, broken segments and token files from its source.

    Args:
        folder: the index.
        open_source: opens the source that the index was built of; needed for segments and token files only.
        budget_bytes: memory for postings.

    Returns:
        What was broken, one line each; every byte is then as it was. Empty where nothing was broken.

    Raises:
        CorruptError: the manifest or `index.json` is broken, so nothing says what the rest was; or what was rebuilt
            has another hash than what was there (the index is left as it was).
        ConfigError: the source is needed and not known.
        ResumeError: the source's inputs are others than those of the index, each named.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    problems = verify_folder(folder)
    if not problems:
        return []
    lines = shown(folder, problems)
    description = IndexMeta.read(folder)
    damage = damage_of(folder, description, problems)
    if damage.other:
        raise CorruptError(
            f"{'; '.join(map(str, damage.other))}; nothing else says how to read this index: build it again"
        )
    bench = folder.parent / f".{folder.name}.repair"
    with folder_lock(bench):
        mender = _Mender(folder, bench, description, manifest["files"], budget_bytes)
        if damage.needs_source:
            mender.from_source(damage, _opened(folder, description, open_source))
        for coder, found in damage.statistics.items():
            mender.statistics(coder, found)
        shutil.rmtree(bench, ignore_errors=True)
    left = verify_folder(folder)
    if left:
        raise CorruptError(f"still broken: {'; '.join(map(str, left))}")
    return lines


def _opened(folder: Path, description: IndexMeta, open_source: Open | Any) -> tuple[Source, Plan]:
    """The source of the index, compared with what the index says it was."""
    built = description.meta.get(BUILD)
    if not isinstance(built, dict):
        raise ConfigError(
            f"{folder}: was not built from a source, so only statistics can be repaired; write it, or join its parts, "
            "again"
        )
    if open_source is None:
        raise ConfigError(f"{folder}: postings or tokens are broken, and the source they came from is not known")
    source = open_source()
    plan = plan_of(source)
    changed = differences(built["inputs"], plan.decides)
    if changed:
        raise ResumeError(f"{folder}: was built of other inputs: {'; '.join(changed)}")
    return source, plan


class _Mender:
    """Rebuilds on a bench beside the index; nothing of the index is touched before its replacement is proved."""

    def __init__(
        self, folder: Path, bench: Path, description: IndexMeta, files: dict[str, dict[str, Any]], budget_bytes: int
    ) -> None:
        self._folder, self._bench, self._description = folder, bench, description
        self._files, self._budget = files, budget_bytes
        for entry in bench.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)

    def from_source(self, damage: Damage, opened: tuple[Source, Plan]) -> None:
        """Token files, segments, the vocabulary."""
        source, plan = opened
        if damage.vocab:
            write_json(self._bench / VOCAB, source.vocab, indent=None)
            self._put(VOCAB, self._bench / VOCAB)
        groups = {number for _, number in damage.segments}
        if damage.tokens:
            groups = set(range(plan.cut.n_groups))
        for group in sorted(groups):
            self._group(plan, group, source)
        for coder, number in damage.segments:
            self._put_segment(plan.frame.folders[coder], number)
        for problem in damage.tokens:
            whole = self._bench / problem.path.name
            append([self._bench / f"{i:05d}" / problem.path.name for i in range(plan.cut.n_groups)], whole)
            self._put(problem.path.name, whole)

    def _group(self, plan: Plan, number: int, source: Source) -> None:
        log.info("repairing segment %d (shards %d to %d)", number, *_ends(plan.cut.shards(number)))
        shards = plan.cut.shards(number)
        for shard in shards:
            build_shard(self._bench, plan, shard, source, self._budget)
        home = self._bench / f"{number:05d}"
        home.mkdir()
        fill_group(home, plan, number, [shard_folder(self._bench, shard) for shard in shards], self._budget)
        shutil.rmtree(self._bench / "shards")

    def statistics(self, coder: str, found: list[Problem]) -> None:
        """Derive a coder's statistics anew and put back the broken ones."""
        entry = self._description.coders[coder]
        view = self._bench / "view"
        (view / entry.folder).mkdir(parents=True)
        for place in self._folder.iterdir():
            if place.is_file():
                (view / place.name).symlink_to(place.resolve())
        for i in range(len(self._description.segments)):
            name = f"{entry.folder}/{segment_folder(i)}"
            (view / name).symlink_to((self._folder / name).resolve())
        derive(view, self._description, coder, self._budget)
        for problem in found:
            self._put(
                f"{entry.folder}/{STATISTICS}/{problem.path.name}", view / entry.folder / STATISTICS / problem.path.name
            )
        shutil.rmtree(view)

    def _put(self, name: str, new: Path) -> None:
        self._prove(name, new)
        sweep(self._folder / name)
        with atomic_file(self._folder / name) as temp:
            shutil.copyfile(new, temp)

    def _put_segment(self, home: str, number: int) -> None:
        name, new = f"{home}/{segment_folder(number)}", self._bench / f"{number:05d}" / home
        self._prove(f"{name}/{MANIFEST}", new / MANIFEST)
        sweep(self._folder / name)
        with atomic_folder(self._folder / name) as temp:
            for file in new.iterdir():
                shutil.copyfile(file, temp / file.name)

    def _prove(self, name: str, new: Path) -> None:
        expected, found = self._files[name]["sha256"], sha256_file(new)
        if found != expected:
            raise CorruptError(
                f"{self._folder / name}: rebuilt, it has sha256 {found[:12]}…, expected {expected[:12]}…: the source "
                "gives other bytes here than where the index was made (another machine or version?). Nothing of it "
                "was replaced; build the index again"
            )


def _ends(numbers: range) -> tuple[int, int]:
    return numbers[0], numbers[-1]
