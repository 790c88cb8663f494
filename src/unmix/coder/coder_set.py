"""Coders trained jointly whose writes add up: a cross-layer transcoder is one (Ameisen et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unmix.coder.codes import Codes
from unmix.coder.native import load_native, save_native
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import atomic_folder
from unmix.core.errors import ConfigError, FormatError
from unmix.core.manifest import refuse_foreign, require_whole, write_manifest

KIND = "coder-set"


class CoderSet(Mapping[str, SparseCoder]):
    """Coders by name. The value of a hook is the sum of what they write there.

    Each reads its own hooks; `decode` cuts every output into the parts of its writes and adds the parts of one hook.
    """

    def __init__(self, coders: Mapping[str, SparseCoder]) -> None:
        """`ConfigError` where there is none, or two write parts of different widths to one hook."""
        if not coders:
            raise ConfigError("a coder set needs at least one coder")
        self._coders = dict(coders)
        widths: dict[str, tuple[int, str]] = {}
        for name, coder in self._coders.items():
            for hook, width in zip(coder.config.writes, coder.config.parts(), strict=True):
                known, other = widths.setdefault(hook, (width, name))
                if width != known:
                    raise ConfigError(f"{name} writes {width} values to {hook}, {other} writes {known}")
        self.widths = {hook: width for hook, (width, _) in widths.items()}
        """Width of each hook that is written."""

    def __getitem__(self, name: str) -> SparseCoder:
        return self._coders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._coders)

    def __len__(self) -> int:
        return len(self._coders)

    @property
    def reads(self) -> tuple[str, ...]:
        """Every hook that some coder reads, once."""
        return tuple(dict.fromkeys(hook for coder in self.values() for hook in coder.config.reads))

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Codes]:
        """Codes by coder, from `inputs` {hook: [*leading, d]}. `ConfigError` where a hook is missing."""
        missing = [hook for hook in self.reads if hook not in inputs]
        if missing:
            raise ConfigError(f"no input for {', '.join(missing)}; this set reads {', '.join(self.reads)}")
        return {
            name: coder.encode(torch.cat([inputs[hook] for hook in coder.config.reads], dim=-1))
            for name, coder in self.items()
        }

    def decode(self, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
        """What the coders of `codes` write, added up, by hook: {hook: [*leading, d]}."""
        total: dict[str, Tensor] = {}
        for name, own in codes.items():
            config = self[name].config
            parts = self[name].decode(own).split(list(config.parts()), dim=-1)
            for hook, part in zip(config.writes, parts, strict=True):
                total[hook] = total[hook] + part if hook in total else part
        return total

    def save(self, folder: str | Path) -> None:
        """Write one native folder a coder and a manifest, atomically; an older set is replaced whole."""
        refuse_foreign(folder, KIND)
        with atomic_folder(folder) as temp:
            for name, coder in self.items():
                save_native(coder, temp / name)
            write_manifest(temp, KIND, coders=list(self))

    def __repr__(self) -> str:
        """One line: how many coders, what they read and write."""
        return f"CoderSet({len(self)} coders, reads {', '.join(self.reads)}, writes {', '.join(self.widths)})"


def load_set(folder: str | Path) -> CoderSet:
    """Read a folder that `CoderSet.save` wrote; `CorruptError` or `FormatError` where it is not whole."""
    manifest = require_whole(Path(folder), KIND, deep=False)
    names = manifest.get("coders")
    if not isinstance(names, list) or not names:
        raise FormatError(f"{folder}: the manifest of this coder set lists no coders")
    for name in names:
        if Path(str(name)).name != name:
            raise FormatError(f"{folder}: the manifest lists a coder {name!r}, which is no folder's name")
    return CoderSet({str(name): load_native(Path(folder) / str(name)) for name in names})
