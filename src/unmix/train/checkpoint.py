"""Checkpoints: everything a run needs to go on bit for bit, in one folder that is whole or absent."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import atomic_folder, disk_errors, write_json
from unmix.core.config import build
from unmix.core.errors import CorruptError, ResumeError
from unmix.core.manifest import require_whole, write_manifest
from unmix.train.changes import changed_fields

log = logging.getLogger("unmix")
KIND = "checkpoint"
_AVERAGE = "average."


@dataclass
class TrainState:
    """What changes while training, beside the weights."""

    step: int
    tokens_since_fired: Tensor
    """int64 [F]."""
    variance: float
    skipped: int = 0
    """Steps left out because of numbers that are none."""
    average: dict[str, Tensor] = field(default_factory=lambda: {})
    """Running mean of the weights by parameter, where one is kept."""


@dataclass(frozen=True)
class Saved:
    """One coder of a checkpoint."""

    config: CoderConfig
    tensors: dict[str, Tensor]
    state: TrainState
    numbers: Mapping[str, Any]
    """What an optimiser keeps beside tensors, by `part.parameter`."""


Parts = Mapping[str, tuple[SparseCoder, torch.optim.Optimizer, TrainState]]


def save_checkpoint(folder: Path, key: str, parts: Parts, settings: Mapping[str, Any] | None = None) -> None:
    """Write the checkpoint `folder`, whole or not at all.

    `settings` are the plain fields behind `key`, kept so that a later refusal can say which one changed.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    seen: set[int] = set()
    for name, (coder, optimiser, state) in parts.items():
        numbers: dict[str, Any] = {}
        for parameter, p in coder.named_parameters():
            tensors[f"{name}/coder.{parameter}"] = p.detach().contiguous()
            for part, value in optimiser.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    value = value.detach().contiguous()
                    # Some optimisers share a table of theirs between parameters, which a file cannot.
                    value = value.clone() if value.data_ptr() in seen else value
                    seen.add(value.data_ptr())
                    tensors[f"{name}/optim.{part}.{parameter}"] = value
                elif isinstance(value, (int, float)):
                    numbers[f"{part}.{parameter}"] = value
        tensors[f"{name}/tokens_since_fired"] = state.tokens_since_fired
        tensors |= {f"{name}/{_AVERAGE}{parameter}": mean for parameter, mean in state.average.items()}
        facts[name] = {
            "step": state.step, "variance": state.variance.hex(), "skipped": state.skipped, "numbers": numbers,
            "coder": coder.config.model_dump(mode="json"),
        }  # fmt: skip
    with atomic_folder(folder) as temp:
        save_file(tensors, temp / "state.safetensors")
        write_json(temp / "checkpoint.json", {"key": key, "settings": settings or {}, "coders": facts})
        write_manifest(temp, KIND)


def load_checkpoint(
    folder: Path, key: str | None, settings: Mapping[str, Any] | None = None
) -> dict[str, Saved] | None:
    """The coders of the checkpoint by name, or None where there is none. Without `key`, whatever it was made by.

    Raises `CorruptError` for a damaged file and `ResumeError` where it belongs to another config or data, with the
    fields in which `settings` differ.
    """
    if not folder.exists():
        return None
    require_whole(folder, KIND, deep=True)
    facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    if key is not None and facts["key"] != key:
        changed = changed_fields(facts["settings"], settings or {})
        why = changed or f"the same fields, other data or another version: key {facts['key']}, now {key}"
        raise ResumeError(
            f"{folder}: was made by another training config or data ({why}); choose another run folder or remove "
            "this one"
        )
    tensors = load_file(folder / "state.safetensors")
    found: dict[str, Saved] = {}
    for name, fact in facts["coders"].items():
        own = {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}
        counts = own.pop("tokens_since_fired")
        average = {k.removeprefix(_AVERAGE): own.pop(k) for k in list(own) if k.startswith(_AVERAGE)}
        state = TrainState(fact["step"], counts, float.fromhex(fact["variance"]), fact["skipped"], average)
        found[name] = Saved(build(CoderConfig, fact["coder"], source=str(folder)), own, state, fact["numbers"])
    return found


def restore(coder: SparseCoder, optimiser: torch.optim.Optimizer, saved: Saved) -> None:
    """Put weights and the optimiser's state back."""
    prefix = "optim."
    with torch.no_grad():
        for name, p in coder.named_parameters():
            p.copy_(saved.tensors[f"coder.{name}"])
            parts: dict[str, Any] = {}
            for key, value in saved.tensors.items():
                part, _, owner = key.removeprefix(prefix).partition(".")
                if key.startswith(prefix) and owner == name:
                    parts[part] = value.clone()
            for key, number in saved.numbers.items():
                part, _, owner = key.partition(".")
                if owner == name:
                    parts[part] = number
            if parts:
                optimiser.state[p] = parts


class Checkpoints:
    """The newest `keep` checkpoints of a training, `FOLDER/00000200` and so on, named by their step."""

    def __init__(self, folder: Path, key: str, settings: Mapping[str, Any], keep: int) -> None:
        self.folder, self.key, self.settings, self.keep = folder, key, settings, keep

    def steps(self) -> list[int]:
        """Steps of those that are there, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()), reverse=True)

    def save(self, step: int, parts: Parts) -> None:
        """Write one, then forget the oldest. `MachineError` of a disk that refuses leaves the older ones alone."""
        save_checkpoint(self._at(step), self.key, parts, self.settings)
        for old in self.steps()[self.keep :]:
            shutil.rmtree(self._at(old), ignore_errors=True)

    def load(self) -> dict[str, Saved] | None:
        """The newest whole one, or None where there is none; damaged ones before it are told and removed.

        `CorruptError` where all are damaged, `ResumeError` where it was made by another config or data.
        """
        if self.folder.is_dir():
            for temp in self.folder.glob(".*.tmp"):
                shutil.rmtree(temp, ignore_errors=True)
        steps = self.steps()
        broken: list[tuple[int, CorruptError]] = []
        for step in steps:
            try:
                found = load_checkpoint(self._at(step), self.key, self.settings)
            except CorruptError as error:
                broken.append((step, error))
                continue
            for bad, error in broken:
                log.warning("the checkpoint of step %d is damaged (%s): going on from step %d", bad, error, step)
                with disk_errors(self._at(bad)):
                    shutil.rmtree(self._at(bad))
            return found
        if broken:
            raise broken[0][1]
        return None

    def _at(self, step: int) -> Path:
        return self.folder / f"{step:08d}"
