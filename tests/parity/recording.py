"""What the fixture scripts of this folder share: random weights that expose mistakes, and how a fixture is written.

Runs under a peer's interpreter, which knows torch and safetensors and not `unmix`.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
D, F, ROWS = 16, 48, 8


def inputs(*middle: int, seed: int = 1, width: int = D) -> Tensor:
    """`[8, *middle, width]` with a mean, a scale of its own for each row, and none of it zero."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, *middle, width, generator=rng)
    scale = torch.linspace(0.5, 3.0, ROWS).reshape(-1, *[1] * (x.ndim - 1))
    return x * scale + 0.3


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights of about unit rows that have different norms, biases away from zero and mostly below it."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=rng)
        if parameter.ndim == 1:
            parameter.copy_(0.4 * draw - 0.2)
        else:
            stretch = torch.linspace(0.5, 2.0, parameter.shape[-1])
            parameter.copy_(draw * stretch / parameter.shape[-1] ** 0.5)


def stub(name: str, path: Path | None = None, **attributes: Any) -> None:
    """Put a stand-in module in place of an import that the peer's maths does not need."""
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module


def start(peer: str, kind: str) -> Path:
    """An empty folder for one fixture."""
    folder = HERE / peer / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def dense(values: Tensor, indices: Tensor, n: int = F) -> Tensor:
    """Selected values at their latents, zeros elsewhere."""
    return torch.zeros(*values.shape[:-1], n).scatter_(-1, indices, values)


def record(
    folder: Path, tensors: Mapping[str, Tensor], peer: str, version: str, loads: list[dict[str, Any]] | None = None
) -> None:
    """Write `expected.safetensors` and `recorded.json`.

    `loads` says which coder gives which tensors: place below the folder, name inside it, prefix of its tensors.
    """
    kept = {key: value.detach().to(torch.float32).contiguous().clone() for key, value in tensors.items()}
    for key, value in kept.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{folder}: {key} is not finite")
    save_file(kept, folder / "expected.safetensors")
    facts = {
        "peer": peer,
        "version": version,
        "torch": torch.__version__.split("+")[0],
        "command": f"python tests/parity/{Path(sys.argv[0]).name}",
        "loads": loads or [{"place": ".", "name": "", "prefix": ""}],
    }
    (folder / "recorded.json").write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if size > 60_000:
        raise ValueError(f"{folder}: {size} bytes, expected at most 60,000")


def written(out: Path, format: str) -> list[tuple[str, Path, dict[str, Tensor]]]:
    """What `write_for_peers.py` wrote: kind, folder, and our own numbers."""
    from safetensors.torch import load_file

    folders = sorted(f for f in (out / format).iterdir() if f.is_dir())
    return [(f.name, f / "written", load_file(f / "expected.safetensors")) for f in folders]


def report(format: str, kind: str, acts: Tensor | None, recon: Tensor, expected: Mapping[str, Tensor]) -> None:
    """Say how far the peer is from us, and fail over 1e-5 of the largest."""
    far = {}
    for name, found in (("acts", acts), ("recon", recon)):
        if found is not None:
            wanted = expected[name]
            far[name] = float((found.detach().reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max())
    sys.stdout.write(f"{format} {kind}: " + ", ".join(f"{name} {value:.1e}" for name, value in far.items()) + "\n")
    if max(far.values()) > 1e-5:
        raise SystemExit(f"{format} {kind}: the peer computes something else")
