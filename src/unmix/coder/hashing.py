"""One number for what a coder computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig


def coder_hash(config: CoderConfig, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (16 hex digits) of config and weights; `tensors` come in the order of their names."""
    digest = hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name}:{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
