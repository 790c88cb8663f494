"""safetensors in several files, with an index of which tensor is where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.base import Header, Store
from unmix.formats.stores.content import open_content
from unmix.formats.stores.paths import sibling
from unmix.formats.stores.safetensors_file import SafetensorsStore


class ShardedStore(Store):
    """The tensors of an index. `values` are the index's metadata."""

    def __init__(self, index: Mapping[str, Any], path: Path, shown: str) -> None:
        """`FormatError` for shards outside the index's folder, `CorruptError` where shards and index disagree."""
        self.shown = shown
        self._metadata = index.get("metadata") or {}
        weight_map = index["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CorruptError(f"{shown}: its weight_map must map names of tensors to names of files")
        self._where = cast("dict[str, str]", weight_map)
        self._shards: dict[str, SafetensorsStore] = {}
        for name in dict.fromkeys(self._where.values()):
            there = sibling(path, name, shown)
            if not there.is_file():
                raise CorruptError(f"{shown}: the shard {name} is missing")
            self._shards[name] = SafetensorsStore(open_content(there, f"{shown}: {name}"), f"{shown}: {name}")
        self._check()

    def headers(self) -> Mapping[str, Header]:
        return {key: self._shards[name].headers()[key] for key, name in self._where.items()}

    @property
    def values(self) -> Mapping[str, Any]:
        if not isinstance(self._metadata, dict):
            raise FormatError(f"{self.shown}: its metadata must be an object")
        return cast("dict[str, Any]", self._metadata)

    def read(self, key: str) -> Tensor:
        return self._shards[self._where[key]].read(key)

    def _check(self) -> None:
        """Every tensor is in the shard that the index says, and in no other."""
        found: dict[str, str] = {}
        for name, shard in self._shards.items():
            for key in shard.headers():
                if key in found:
                    raise CorruptError(f"{self.shown}: {key} is in two shards, {found[key]} and {name}")
                found[key] = name
        for key, name in self._where.items():
            if key not in found:
                raise CorruptError(f"{self.shown}: {name} lacks the tensor {key}")
            if found[key] != name:
                raise CorruptError(f"{self.shown}: {key} is in {found[key]}, the index says {name}")
        if extra := sorted(set(found) - set(self._where)):
            raise CorruptError(f"{self.shown}: {found[extra[0]]} holds {extra[0]}, which the index does not list")
