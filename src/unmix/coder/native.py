"""The native folder: `config.json` + `coder.safetensors` + `manifest.json`, atomic and hashed.

Facts published beside the weights (`SparseCoder.statistics`) lie in `statistics.safetensors`, where there are any.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import atomic_folder, write_json
from unmix.core.config import build
from unmix.core.errors import ConfigError, CorruptError, FormatError, NonFiniteError
from unmix.core.manifest import MANIFEST, refuse_foreign, require_whole, write_manifest

KIND = "coder"
CONFIG = "config.json"
WEIGHTS = "coder.safetensors"
STATISTICS = "statistics.safetensors"
FORMAT = "unmix-1"


def save_native(coder: SparseCoder, folder: str | Path) -> None:
    """Write `coder` to `folder`, replacing an older coder whole.

    Before anything is written: `NonFiniteError` for NaN or infinity in the weights, `ConfigError` where `folder` holds
    anything but an older coder.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in coder.state_dict().items()}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{coder.name}: {name} holds NaN or infinity; nothing was saved")
    refuse_foreign(folder, KIND)
    with atomic_folder(folder) as temp:
        write_config(coder.config, temp)
        save_file(state, temp / WEIGHTS, metadata={"format": FORMAT})
        if coder.statistics:
            save_file({k: t.detach().cpu().contiguous() for k, t in coder.statistics.items()}, temp / STATISTICS)
        write_manifest(temp, KIND, coder_hash=coder.hash())


def write_config(config: CoderConfig, folder: Path) -> None:
    """Write `config.json`."""
    write_json(folder / CONFIG, {"format": FORMAT, **config.model_dump(mode="json")})


def read_native_config(folder: str | Path) -> CoderConfig:
    """The config alone, validated."""
    path = Path(folder) / CONFIG
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as a coder's config ({error})") from error
    found = tree.pop("format", None) if isinstance(tree, dict) else None
    if found is None:
        raise FormatError(f"{path}: not a native coder config (no field 'format')")
    if found != FORMAT:
        raise FormatError(f"{path}: format {found!r}, this version reads {FORMAT!r}")
    try:
        return build(CoderConfig, tree, source=str(path))
    except ConfigError as error:
        raise FormatError(str(error)) from error


def load_native(folder: str | Path, device: torch.device | str = "cpu") -> SparseCoder:
    """Read a native folder; `CorruptError` for a file of wrong length or hash, `FormatError` for wrong tensors."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        require_whole(folder, KIND, deep=True)
    config = read_native_config(folder)
    state = _tensors(folder / WEIGHTS, device)
    _check_state(state, config, folder / WEIGHTS)
    statistics = _tensors(folder / STATISTICS, device) if (folder / STATISTICS).is_file() else {}
    return SparseCoder.from_state(config, state, statistics)


def _tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"{path}: cannot be read ({error})") from error


def _check_state(state: dict[str, Tensor], config: CoderConfig, path: Path) -> None:
    """`FormatError` where the tensors read from `path` are not the parameters of `config`, in one floating dtype."""
    with torch.device("meta"):
        expected = SparseCoder(config).state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            fault = "missing" if name not in state else "unknown"
            raise FormatError(f"{path}: tensor {name} is {fault}; expected {', '.join(sorted(expected))}")
        if state[name].shape != expected[name].shape:
            raise FormatError(
                f"{path}: {name} is {list(state[name].shape)}, expected {list(expected[name].shape)} "
                f"(d_in={config.d_in}, d_out={config.d_out}, n_latents={config.n_latents})"
            )
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1 or not state["W_dec"].is_floating_point():
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise FormatError(f"{path}: tensors are {listed}, expected one floating-point dtype")
