"""How the work of an index is cut: fixed ranges of contexts (shards), and runs of them (groups, one segment each).

The cut is a function of the number of contexts and of their length alone. No option changes it, nor do workers,
machines or memory, so that the same inputs give the same bytes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from unmix.core.atomic import write_json
from unmix.core.config import semantic_hash
from unmix.core.errors import CorruptError, DataError
from unmix.index.frame import Frame
from unmix.index.layout import INDEX_SCHEMA, SEGMENT_TOKENS, Segment, plain_meta

if TYPE_CHECKING:
    from unmix.index.sources.base import Source

SHARD_TOKENS = 2**18
"""Positions of a shard: minutes of work for a model, 134 MB of postings at L0 64."""
LEAST_TOKENS = 2**20
"""Positions of a segment at least (the last may have fewer)."""
MOST_SEGMENTS = 16
"""Segments of an index, as long as none grows past `MOST_TOKENS`: a latent is read from each of them."""
MOST_TOKENS = 2**24
"""Positions of a segment at most: what a latent that always fires costs to merge is bounded by it."""
PLAN = "plan.json"


@dataclass(frozen=True)
class Cut:
    """The contexts of an index in shards of `shard` contexts, and these in groups of `group` shards."""

    n_contexts: int
    context: int
    shard: int
    group: int

    @property
    def n_shards(self) -> int:
        """How many shards."""
        return -(-self.n_contexts // self.shard)

    @property
    def n_groups(self) -> int:
        """How many groups: segments of the index."""
        return -(-self.n_shards // self.group)

    def contexts(self, shard: int) -> tuple[int, int]:
        """The contexts `[first, last)` of a shard."""
        return shard * self.shard, min((shard + 1) * self.shard, self.n_contexts)

    def shards(self, group: int) -> range:
        """The shards of a group."""
        return range(group * self.group, min((group + 1) * self.group, self.n_shards))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segment of each group."""
        return tuple(self._segments())

    def _segments(self) -> Iterator[Segment]:
        for group in range(self.n_groups):
            shards = self.shards(group)
            first, last = self.contexts(shards[0])[0], self.contexts(shards[-1])[1]
            yield Segment(first * self.context, (last - first) * self.context)


def shard_contexts(context: int) -> int:
    """Contexts in a shard."""
    return max(SHARD_TOKENS // context, 1)


def cut(n_contexts: int, context: int, most: int | None = None) -> Cut:
    """The cut of so many contexts; `most` positions in a segment instead of what the sizes say."""
    shard = shard_contexts(context)
    if most is not None:
        shard = min(shard, max(most // context, 1))
        return Cut(n_contexts, context, shard, max(most // context // shard, 1))
    tokens = shard * context
    group = max(-(-LEAST_TOKENS // tokens), -(-n_contexts // (shard * MOST_SEGMENTS)))
    return Cut(n_contexts, context, shard, max(min(group, min(MOST_TOKENS, SEGMENT_TOKENS) // tokens), 1))


@dataclass(frozen=True)
class Plan:
    """Everything that building an index needs beside the source's batches. Lies as `plan.json` in the building."""

    frame: Frame
    cut: Cut
    inputs: dict[str, Any]
    """What decides the bytes, by name."""
    meta: dict[str, Any]
    """The source's facts; kept in the index, no part of the key."""

    @cached_property
    def decides(self) -> dict[str, Any]:
        """Everything that decides the bytes, the inputs and what the index itself adds."""
        frame = asdict(self.frame)
        return cast(
            "dict[str, Any]",
            json.loads(
                json.dumps({**self.inputs, "index": {"layout": INDEX_SCHEMA, **frame, "cut": asdict(self.cut)}})
            ),
        )

    @cached_property
    def key(self) -> str:
        """16 hex digits: the same for the same inputs."""
        return semantic_hash("index build", self.decides)

    def shard_key(self, shard: int) -> str:
        """Key of one shard."""
        return semantic_hash(self.key, "shard", *self.cut.contexts(shard))

    def group_key(self, group: int) -> str:
        """Key of one group."""
        return semantic_hash(self.key, "group", group)

    def write(self, building: Path) -> None:
        """Write `plan.json`."""
        tree = {
            "key": self.key, "frame": asdict(self.frame), "cut": asdict(self.cut), "inputs": self.inputs,
            "meta": self.meta,
        }  # fmt: skip
        write_json(building / PLAN, tree)

    @classmethod
    def read(cls, building: Path) -> Plan:
        """Read `plan.json`; `CorruptError` where it is not what this version writes."""
        path = building / PLAN
        try:
            tree = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
            return cls(Frame(**tree["frame"]), Cut(**tree["cut"]), tree["inputs"], tree["meta"])
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise CorruptError(f"{path}: not the plan of a build ({error!r})") from error


def plan_of(source: Source) -> Plan:
    """The plan of a source. `DataError` where it has no contexts."""
    if not source.n_contexts:
        raise DataError("the source has no contexts, so there is nothing to index")
    slices = {name: list(values) for name, values in source.slices.items()}
    latents = {name: int(n) for name, n in source.latents.items()}
    size = None if source.vocab_size is None else int(source.vocab_size)
    frame = Frame(latents, int(source.context), list(source.roles), slices, size)
    division = cut(int(source.n_contexts), frame.context)
    return Plan(frame, division, plain_meta(source.inputs), plain_meta(source.meta))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two trees of inputs, one phrase each."""
    old, new = _flat(before), _flat(now)
    found: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            found.append(f"{_shown(name)} is new: {_value(new[name])}")
        elif name not in new:
            found.append(f"{_shown(name)} is gone (it was {_value(old[name])})")
        elif old[name] != new[name]:
            found.append(f"{_shown(name)} changed: {_value(old[name])} → {_value(new[name])}")
    return found


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    result: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= _flat(cast("Mapping[str, Any]", value), (*path, key))
        else:
            result[(*path, key)] = value
    return result


def _shown(path: tuple[str, ...]) -> str:
    """`coders → layers.10` is shown as: coder 'layers.10'."""
    *kinds, name = path
    return f"{' '.join(kind.removesuffix('s') for kind in kinds)} {name!r}" if kinds else name


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) >= 32 and all(c in "0123456789abcdef" for c in text):
        return f"{text[:12]}…"
    return text if len(text) <= 60 else f"{text[:57]}…"
