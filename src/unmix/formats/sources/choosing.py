"""Which files of a listing are needed for a coder: a folder's own, or one file and the small ones beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".pkl", ".pkl.gz")
SETTINGS = (".json", ".yaml", ".yml")
SUFFIXES = (*WEIGHTS, *SETTINGS)
"""What a file of a coder may end in."""
SMALL = 64_000_000
"""Bytes. Statistics beside weights (one float a latent) stay below this; other coders' weights rarely do."""
PARTS = ("checkpoints",)
"""Folders that belong to the coder above them (Llama Scope keeps its weights in one)."""
_SHARD = re.compile(r"^(.*)-\d{5}-of-(\d{5})\.safetensors$")
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One remote file; `size` in bytes."""

    path: str
    size: int

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def folder(self) -> str:
        """The path without its last part; empty at the root."""
        parent = str(PurePosixPath(self.path).parent)
        return "" if parent == "." else parent


def is_weights(name: str) -> bool:
    """Whether a file of this name may hold tensors."""
    return name.endswith(WEIGHTS)


def names_a_file(path: str) -> bool:
    """Whether the last part of `path` looks like one of a coder's files, not like a folder (`blocks.6.hook_mlp`)."""
    return path.endswith(SUFFIXES)


def stem(name: str) -> str:
    """`layer5` of `layer5.sae.pt` and of `layer5.json`: what is before the endings of weights and settings."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name.removesuffix(suffix).removesuffix(".sae")
    return name


def of_folder(files: Sequence[Entry], folder: str) -> list[Entry]:
    """What a coder in `folder` may consist of: the files right inside, and those of its `PARTS`."""
    inside = {folder, *(f"{folder}/{part}".lstrip("/") for part in PARTS)}
    return [f for f in files if f.folder in inside and f.name.endswith(SUFFIXES)]


def with_companions(files: Sequence[Entry], chosen: Entry) -> list[Entry]:
    """`chosen`, and what is needed to read it: its settings, its statistics, the other shards of the same tensors.

    Naming the settings of a folder names the coder in it. Weights and settings of other coders that share the folder
    are left out: those settings have the stem of another weights file.
    """
    beside = [f for f in files if f.folder == chosen.folder and f.name.endswith(SUFFIXES)]
    if chosen.name.endswith(_INDEX) or _SHARD.match(chosen.name):
        return [f for f in beside if not is_weights(f.name) or _SHARD.match(f.name) or f == chosen]
    weights = [f for f in beside if is_weights(f.name)]
    stems = {stem(f.name) for f in weights}
    mine = stem(chosen.name)
    if not is_weights(chosen.name):
        if mine not in stems:
            return of_folder(files, chosen.folder)
        return [f for f in beside if stem(f.name) == mine or _is_statistic(f, mine) or _is_shared(f, stems, mine)]
    above = [f for f in files if PurePosixPath(chosen.folder).name in PARTS and _is_above(f, chosen)]
    return [
        f
        for f in [*beside, *above]
        if f == chosen
        or _is_statistic(f, mine)
        or _is_shared(f, stems, mine)
        or (_is_settings(f) and stem(f.name) == mine)
    ]


def _is_above(file: Entry, chosen: Entry) -> bool:
    parent = str(PurePosixPath(chosen.folder).parent)
    return _is_settings(file) and file.folder == ("" if parent == "." else parent)


def _is_settings(file: Entry) -> bool:
    return file.name.endswith(SETTINGS) and file.size <= SMALL


def _is_shared(file: Entry, stems: set[str], mine: str) -> bool:
    """Settings that belong to no other weights file: `cfg.json`; not `layer_3.json`, `layer_3_cfg.json` of layer_3."""
    others = stems - {mine}
    name = stem(file.name)
    return _is_settings(file) and not any(name == other or name.startswith(f"{other}_") for other in others)


def _is_statistic(file: Entry, mine: str) -> bool:
    """`NAME_log_feature_sparsity.pt` beside `NAME.pt`, and `sparsity.safetensors` beside `sae_weights.safetensors`."""
    if not is_weights(file.name) or file.size > SMALL:
        return False
    return stem(file.name) in (f"{mine}_log_feature_sparsity", "sparsity", "activation_whitening")
