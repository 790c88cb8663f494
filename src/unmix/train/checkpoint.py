"""Checkpoints: everything a run needs to go on bit for bit, in one folder that is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import atomic_folder, write_json
from unmix.core.config import build
from unmix.core.errors import ResumeError
from unmix.core.manifest import require_whole, write_manifest

KIND = "checkpoint"


@dataclass
class TrainState:
    """What changes while training, beside the weights."""

    step: int
    tokens_since_fired: Tensor
    """int64 [F]."""
    variance: float


@dataclass(frozen=True)
class Saved:
    """One coder of a checkpoint."""

    config: CoderConfig
    tensors: dict[str, Tensor]
    state: TrainState


Parts = Mapping[str, tuple[SparseCoder, torch.optim.Optimizer, TrainState]]


def save_checkpoint(folder: Path, key: str, parts: Parts) -> None:
    """Replace the checkpoint in `folder`; the older one stays whole until the new one is."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, (coder, optimiser, state) in parts.items():
        for parameter, p in coder.named_parameters():
            tensors[f"{name}/coder.{parameter}"] = p.detach().contiguous()
            for part, value in optimiser.state.get(p, {}).items():
                tensors[f"{name}/adam.{part}.{parameter}"] = value.detach().contiguous()
        tensors[f"{name}/tokens_since_fired"] = state.tokens_since_fired
        facts[name] = {
            "step": state.step, "variance": state.variance.hex(), "coder": coder.config.model_dump(mode="json"),
        }  # fmt: skip
    with atomic_folder(folder) as temp:
        save_file(tensors, temp / "state.safetensors")
        write_json(temp / "checkpoint.json", {"key": key, "coders": facts})
        write_manifest(temp, KIND)


def load_checkpoint(folder: Path, key: str) -> dict[str, Saved] | None:
    """The coders of the checkpoint by name, or None where there is none.

    Raises `CorruptError` for a damaged file and `ResumeError` where it belongs to another config or data.
    """
    if not folder.exists():
        return None
    require_whole(folder, KIND, deep=True)
    facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    if facts["key"] != key:
        raise ResumeError(
            f"{folder}: was made by another training config or data (key {facts['key']}, now {key}); "
            f"choose another run folder or remove this one"
        )
    tensors = load_file(folder / "state.safetensors")
    found: dict[str, Saved] = {}
    for name, fact in facts["coders"].items():
        own = {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}
        state = TrainState(fact["step"], own.pop("tokens_since_fired"), float.fromhex(fact["variance"]))
        found[name] = Saved(build(CoderConfig, fact["coder"], source=str(folder)), own, state)
    return found


def restore(coder: SparseCoder, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put weights and Adam's moments back."""
    with torch.no_grad():
        for name, p in coder.named_parameters():
            p.copy_(tensors[f"coder.{name}"])
            prefix = "adam."
            parts = {
                key[len(prefix) :].split(".", 1)[0]: value
                for key, value in tensors.items()
                if key.startswith(prefix) and key[len(prefix) :].split(".", 1)[1] == name
            }
            if parts:
                optimiser.state[p] = {part: value.clone() for part, value in parts.items()}
