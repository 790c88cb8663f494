"""What the `make_*` scripts of the scope families share: weights of one seed, checks that gates really gate, writing.

A recorded kind is a folder: the checkpoint in its published layout, `expected.safetensors` and `recorded.json`
(which peer, which version, and `place`: what to load). Keys of `expected.safetensors`: `x`, `acts`, `recon`, or
`x.<name>`, `acts.<name>` and `recon.<layer>` where a place holds several coders.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
D, F, LAYERS, ROWS = 16, 48, 3, 8
LIMIT = 80_000


class Weights:
    """Random tensors from one seed: decoder rows of unequal norm, biases that matter, thresholds in the middle."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values."""
        return torch.randn(*shape, generator=self.rng) * scale

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform values."""
        return low + (high - low) * torch.rand(*shape, generator=self.rng)

    def affine(self, d_in: int = D, d_out: int = D) -> dict[str, Tensor]:
        """`W_enc [d_in, F] b_enc W_dec [F, d_out] b_dec`, the decoder's rows of norms from 0.5 to 3."""
        rows = torch.nn.functional.normalize(self.normal(F, d_out), dim=-1)
        return {
            "W_enc": self.normal(d_in, F, scale=d_in**-0.5),
            "b_enc": self.normal(F, scale=0.3),
            "W_dec": rows * self.between(0.5, 3.0, F, 1),
            "b_dec": self.normal(d_out, scale=0.5),
        }


def gates(z: Tensor, acts: Tensor) -> None:
    """Fails where a gate lets everything positive through, or nothing."""
    kept, positive = int((acts != 0).sum()), int((z > 0).sum())
    assert 0 < kept < 0.9 * positive, f"{kept} of {positive} positive pre-activations kept"


def fresh(peer: str, kind: str) -> Path:
    """The empty folder of one recorded kind."""
    folder = HERE / peer / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def record(
    folder: Path, place: str, expected: dict[str, Tensor], peer: str, *, transcribed: bool, **facts: Any
) -> None:
    """Write the expected tensors and where they come from; fails over `LIMIT` bytes."""
    save_file({k: v.detach().contiguous().float() for k, v in expected.items()}, folder / "expected.safetensors")
    words = [argument for argument in sys.argv[1:] if "/" not in argument]
    recorded = {
        "place": place, "peer": peer, "transcribed": transcribed, "torch": torch.__version__.split("+")[0],
        "command": " ".join(["python", f"tests/parity/{Path(sys.argv[0]).name}", *words]), **facts,
    }  # fmt: skip
    (folder / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert size < LIMIT, f"{folder}: {size} bytes"


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
