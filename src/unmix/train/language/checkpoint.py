"""Checkpoints of a language model under training: weights, AdamW's moments, counters; whole or absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmix.core.atomic import atomic_folder, write_json
from unmix.core.errors import ResumeError
from unmix.core.manifest import require_whole, write_manifest

KIND = "language-checkpoint"


@dataclass
class Progress:
    """What changes beside weights and optimiser."""

    step: int = 0
    loss_sum: float = 0.0
    """Losses since the last line of the log."""
    loss_steps: int = 0


def save(folder: Path, key: str, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Replace the checkpoint in `folder`; the older one stays whole until the new one is."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        tensors[f"weights.{name}"] = p.detach().contiguous().cpu()
        for part, value in optimiser.state.get(p, {}).items():
            tensors[f"adam.{part}.{name}"] = value.detach().contiguous().cpu()
    facts = {
        "key": key, "step": progress.step, "loss_sum": progress.loss_sum.hex(), "loss_steps": progress.loss_steps,
    }  # fmt: skip
    with atomic_folder(folder) as temp:
        save_file(tensors, temp / "state.safetensors")
        write_json(temp / "checkpoint.json", facts)
        write_manifest(temp, KIND)


def load(folder: Path, key: str, model: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
    """Put everything back and say how far it was; a fresh `Progress` where there is no checkpoint.

    Raises `CorruptError` for a damaged file and `ResumeError` where it belongs to other settings or text.
    """
    if not folder.exists():
        return Progress()
    require_whole(folder, KIND, deep=True)
    facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    if facts["key"] != key:
        raise ResumeError(f"{folder}: was made with other settings or text; choose another folder or remove this one")
    tensors = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors.pop(f"weights.{name}"))
            parts = {key: value for key, value in tensors.items() if key.split(".", 2)[2] == name}
            optimiser.state[p] = {key.split(".", 2)[1]: value.to(p.device) for key, value in parts.items()}
    return Progress(facts["step"], float.fromhex(facts["loss_sum"]), facts["loss_steps"])
