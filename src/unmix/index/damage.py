"""What is broken in an index, named by what a user knows of it: coder, segment, tokens, shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmix.core.errors import CorruptError
from unmix.core.manifest import Problem
from unmix.index.layout import DOCUMENTS, MASK, ROLE_BYTES, TOKENS, IndexMeta, segment_folder, slice_file

BUILD = "build"
"""Where `meta` of an index says what it was built of: `{"key": …, "inputs": {…}}`."""
STATISTICS = "statistics"
VOCAB = "vocab.json"


@dataclass(frozen=True)
class Damage:
    """The broken files of an index, by what mends them."""

    segments: dict[tuple[str, int], list[Problem]] = field(default_factory=dict[tuple[str, int], list[Problem]])
    """By coder and number of the segment."""
    tokens: list[Problem] = field(default_factory=list[Problem])
    """Token files."""
    statistics: dict[str, list[Problem]] = field(default_factory=dict[str, list[Problem]])
    """By coder."""
    vocab: list[Problem] = field(default_factory=list[Problem])
    other: list[Problem] = field(default_factory=list[Problem])
    """What says how to read the rest."""

    @property
    def needs_source(self) -> bool:
        """Whether anything is broken that the postings do not give back."""
        return bool(self.segments or self.tokens or self.vocab)


def damage_of(folder: Path, description: IndexMeta, problems: Sequence[Problem]) -> Damage:
    """Sort the problems that `verify_folder` found."""
    damage = Damage()
    homes = {entry.folder: name for name, entry in description.coders.items()}
    numbers = {segment_folder(i): i for i in range(len(description.segments))}
    token_files = {TOKENS, DOCUMENTS, ROLE_BYTES, MASK, *map(slice_file, description.slices)}
    for problem in problems:
        top, *below = problem.path.relative_to(folder).parts
        coder = homes.get(top) if len(below) > 1 else None
        if coder is not None and below[0] in numbers:
            damage.segments.setdefault((coder, numbers[below[0]]), []).append(problem)
        elif coder is not None and below[0] == STATISTICS:
            damage.statistics.setdefault(coder, []).append(problem)
        elif top in token_files:
            damage.tokens.append(problem)
        elif top == VOCAB:
            damage.vocab.append(problem)
        else:
            damage.other.append(problem)
    return damage


def shown(folder: Path, problems: Sequence[Problem]) -> list[str]:
    """One line for each broken part of an index: what it is, which tokens and shards it holds, and its files."""
    try:
        description = IndexMeta.read(folder)
    except CorruptError:
        return [str(problem) for problem in problems]
    damage = damage_of(folder, description, problems)
    lines = [
        f"segment {number} of {coder!r} ({span_of(description, number)}): {_files(folder, found)}"
        for (coder, number), found in sorted(damage.segments.items())
    ]
    lines += [f"statistics of {coder!r}: {_files(folder, found)}" for coder, found in sorted(damage.statistics.items())]
    if damage.tokens:
        lines.append(f"token files: {_files(folder, damage.tokens)}")
    return lines + [_files(folder, [problem]) for problem in [*damage.vocab, *damage.other]]


def span_of(description: IndexMeta, number: int) -> str:
    """The tokens of a segment and, where they are known, its shards."""
    segment = description.segments[number]
    text = f"tokens {segment.base:,} to {segment.base + segment.tokens - 1:,}"
    cut = _cut(description.meta)
    if cut is None:
        return text
    first = segment.base // description.context // cut
    last = -(-((segment.base + segment.tokens) // description.context) // cut) - 1
    return f"{text}, shards {first} to {last}" if last > first else f"{text}, shard {first}"


def _cut(meta: dict[str, Any]) -> int | None:
    """Contexts in a shard of the build."""
    try:
        return int(meta[BUILD]["inputs"]["index"]["cut"]["shard"])
    except (KeyError, TypeError, ValueError):
        return None


def _files(folder: Path, problems: Sequence[Problem]) -> str:
    names = (problem.path.relative_to(folder).as_posix() for problem in problems)
    return "; ".join(f"{name}: found {p.found}, expected {p.expected}" for name, p in zip(names, problems, strict=True))
