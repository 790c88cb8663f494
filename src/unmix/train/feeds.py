"""What a step of training is made of: rows of activations, or the language model run through its reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from unmix.coder.config import CoderConfig
from unmix.train.guard import Traceable
from unmix.train.learner import Learner
from unmix.train.objectives import Step
from unmix.train.source import ActivationSource


class Feed(Protocol):
    """Batches of any step, for every coder under training."""

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        ...

    def sample(self, coder: CoderConfig) -> ActivationSource:
        """Rows that first weights are set by."""
        ...

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """What every coder makes of the batch of step `index`, `size` rows.

        In parts, each with a graph of its own: one that went backward before the next is asked for is freed.
        """
        ...


class RowFeed:
    """One source of rows, the same for every coder: a sweep."""

    def __init__(self, source: ActivationSource) -> None:
        self.source = source

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.source.n_rows

    def sample(self, coder: CoderConfig) -> ActivationSource:
        """The source itself."""
        return self.source

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """The batch is made once."""
        x, target = self.source.batch(index, size)
        for name, learner in learners.items():
            yield {name: learner.forward(x, target)}

    def places(self, index: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Where rows of a batch come from, where the source knows."""
        return self.source.places(index, size, rows) if isinstance(self.source, Traceable) else []


class HookFeed:
    """Sources of rows by hooks, all of one stream: coders at several hooks take the rows of one forward pass."""

    def __init__(self, sources: Mapping[tuple[tuple[str, ...], tuple[str, ...]], ActivationSource]) -> None:
        """`sources`: by `(reads, writes)`; they must give the same rows in the same order."""
        self.sources = dict(sources)

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return min(source.n_rows for source in self.sources.values())

    def sample(self, coder: CoderConfig) -> ActivationSource:
        """The source of the coder's hooks."""
        return self.sources[coder.reads, coder.writes]

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """Each pair of hooks is read once, however many coders share it."""
        batches = {hooks: source.batch(index, size) for hooks, source in self.sources.items()}
        for name, learner in learners.items():
            yield {name: learner.forward(*batches[learner.coder.config.reads, learner.coder.config.writes])}

    def places(self, index: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Where rows of a batch come from, where the sources know."""
        source = next(iter(self.sources.values()))
        return source.places(index, size, rows) if isinstance(source, Traceable) else []
