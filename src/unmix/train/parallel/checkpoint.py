"""Checkpoints of a mesh: one ordinary checkpoint a slice of the latents, and one manifest over them all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from unmix.core.atomic import atomic_folder, write_json
from unmix.core.errors import CorruptError, ResumeError, UnmixError
from unmix.core.manifest import MANIFEST, require_whole, write_manifest
from unmix.train.checkpoint import KIND, Checkpoints, Parts, Saved, load_checkpoint, save_checkpoint
from unmix.train.parallel.mesh import Mesh

log = logging.getLogger("unmix")
FACTS = "checkpoint.json"


class MeshCheckpoints(Checkpoints):
    """The newest checkpoints of a training on a mesh, in a folder that all ranks see."""

    def __init__(self, folder: Path, key: str, settings: Mapping[str, Any], keep: int, mesh: Mesh) -> None:
        super().__init__(folder, key, settings, keep)
        self.mesh = mesh

    def save(self, step: int, parts: Parts) -> None:
        """Every rank must call it. `MachineError` on all where one could not write; older ones are left alone then."""
        save_mesh(self._at(step), self.key, parts, self.settings, self.mesh)
        if self.mesh.first:
            for old in self.steps()[self.keep :]:
                shutil.rmtree(self._at(old), ignore_errors=True)

    def load(self) -> dict[str, Saved] | None:
        """This rank's slices of the newest checkpoint that is whole on every rank; None where there is none.

        `CorruptError` where all are damaged, `ResumeError` where it was made by another config, data or mesh.
        """
        mesh = self.mesh
        if mesh.first and self.folder.is_dir():
            for temp in self.folder.glob(".*.tmp"):
                shutil.rmtree(temp, ignore_errors=True)
        mesh.agree(None)
        problem: CorruptError | None = None
        for step in self.steps():
            found, problem = None, None
            try:
                found = load_mesh(self._at(step), self.key, self.settings, mesh)
            except CorruptError as error:
                problem = error
            broken = torch.tensor([problem is not None], dtype=torch.int64, device=mesh.device)
            if not bool(mesh.max_(broken, "all")):
                return found
            problem = problem or CorruptError(f"{self._at(step)}: another rank's slice is damaged")
            log.warning("the checkpoint of step %d is damaged (%s): looking for one before it", step, problem)
        if problem is not None:
            raise problem
        return None


def save_mesh(folder: Path, key: str, parts: Parts, settings: Mapping[str, Any], mesh: Mesh) -> None:
    """Write the checkpoint `folder`, whole or not at all; the first rank of each slice writes it."""
    with ExitStack() as stack:
        temp = Path(mesh.tell(str(stack.enter_context(atomic_folder(folder))) if mesh.first else ""))
        problem: str | None = None
        if mesh.data_index == 0:
            try:
                save_checkpoint(temp / _shard(mesh.dictionary_index), key, parts, settings)
            except UnmixError as error:
                problem = str(error)
        mesh.agree(problem)
        if mesh.first:
            shards = [_shard(i) for i in range(mesh.dictionary)]
            facts = {"key": f"{key} on {mesh}", "settings": dict(settings), "mesh": _sizes(mesh), "shards": shards}
            write_json(temp / FACTS, facts)
            write_manifest(temp, KIND, [FACTS, *(f"{shard}/{MANIFEST}" for shard in shards)])
    mesh.agree(None)


def load_mesh(folder: Path, key: str, settings: Mapping[str, Any], mesh: Mesh) -> dict[str, Saved] | None:
    """This rank's slices by coder.

    Raises `CorruptError` for a damaged file and `ResumeError` where it belongs to another config, data or mesh.
    """
    require_whole(folder, KIND, deep=True)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    found = facts.get("mesh", {"data": 1, "dictionary": 1})
    if found != _sizes(mesh) or "shards" not in facts:
        raise ResumeError(
            f"{folder}: was made on a mesh of data {found['data']} × dictionary {found['dictionary']}, this is {mesh}; "
            "go on with that one, choose another run folder or remove this checkpoint"
        )
    return load_checkpoint(folder / _shard(mesh.dictionary_index), key, settings)


def _shard(i: int) -> str:
    return f"shard-{i:03}"


def _sizes(mesh: Mesh) -> dict[str, int]:
    return {"data": mesh.data, "dictionary": mesh.dictionary}
