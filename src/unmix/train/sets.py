"""Coders trained as one set, whose writes add up: the loss is the error of the sums (Ameisen et al. 2025)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.core.errors import ConfigError
from unmix.train.guard import Traceable
from unmix.train.learner import Learner
from unmix.train.objectives import Step
from unmix.train.source import ActivationSource

Hooks = tuple[tuple[str, ...], tuple[str, ...]]


class SetFeed:
    """A cross-layer transcoder's rows: each coder reads its own hooks, and all write to hooks that they share.

    Every coder's `mse` is its share of one loss, the mean over hooks of the fraction of variance unexplained by what is
    written there in all: a hook that n coders write counts 1/n in each of their shares, so that the shares add up to
    the loss and every coder has the whole loss's gradient. Other terms (sparsity, auxk, prefixes) are each coder's own;
    what the others write stands beside it.
    """

    def __init__(
        self, coders: Mapping[str, CoderConfig], sources: Mapping[Hooks, ActivationSource], sample_rows: int = 8192
    ) -> None:
        """`sources`: by `(reads, writes)`, all giving the same rows in the same order; they may share one stream.

        `sample_rows` of the first rows tell each hook's variance. `ConfigError` where a coder writes what it reads or
        normalises, or where two disagree on the width of a hook.
        """
        self.coders, self.sources = dict(coders), dict(sources)
        self._widths: dict[str, int] = {}
        self._writers: Counter[str] = Counter()
        for name, config in self.coders.items():
            _require_fits(name, config)
            for hook, width in zip(config.writes, config.parts(), strict=True):
                known = self._widths.setdefault(hook, width)
                if known != width:
                    raise ConfigError(f"{name}: writes {width} values to {hook}, another coder of the set {known}")
                self._writers[hook] += 1
        self._variance = self._variances(sample_rows)

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return min(source.n_rows for source in self.sources.values())

    def sample(self, coder: CoderConfig) -> ActivationSource:
        """Rows whose targets are divided among the coders that write them: first biases add up to one centre."""
        counts = [torch.full((w,), float(self._writers[h])) for h, w in zip(coder.writes, coder.parts(), strict=True)]
        return _Shared(self.sources[coder.reads, coder.writes], torch.cat(counts))

    def places(self, index: int, size: int, rows: Sequence[int]) -> list[dict[str, int]]:
        """Where rows of a batch come from, where the sources know."""
        source = next(iter(self.sources.values()))
        return source.places(index, size, rows) if isinstance(source, Traceable) else []

    def steps(self, index: int, size: int, learners: Mapping[str, Learner]) -> Iterator[dict[str, Step]]:
        """One part: the graphs of a set hang together."""
        alone: dict[str, Step] = {}
        total: dict[str, Tensor] = {}
        for name, learner in learners.items():
            config = learner.coder.config
            step = learner.forward(*self.sources[config.reads, config.writes].batch(index, size))
            alone[name] = step
            raw = (step.reconstruction * config.output_scale).split(list(config.parts()), dim=-1)
            for hook, part in zip(config.writes, raw, strict=True):
                total[hook] = total[hook] + part if hook in total else part
        yield {name: self._joint(step, total) for name, step in alone.items()}

    def _joint(self, step: Step, total: Mapping[str, Tensor]) -> Step:
        """The step of one coder, with the sum in place of what it writes itself, in its own inner space."""
        config = step.coder.config
        scale = config.output_scale
        summed = torch.cat([total[hook] for hook in config.writes], dim=-1) / scale
        counts = [
            step.target.new_full((width,), scale**2 / (self._writers[hook] * self._variance[hook] * len(self._widths)))
            for hook, width in zip(config.writes, config.parts(), strict=True)
        ]
        return replace(
            step, reconstruction=summed, others=summed - step.reconstruction, weights=torch.cat(counts), variance=1.0
        )

    def _variances(self, rows: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for (_, writes), source in self.sources.items():
            _, target = source.batch(0, min(rows, source.n_rows))
            for hook, part in zip(writes, target.split([self._widths[hook] for hook in writes], dim=-1), strict=True):
                found[hook] = max(float((part - part.mean(0)).square().sum(-1).mean()), 1e-12)
        return found


class _Shared:
    """Another source with its targets divided."""

    def __init__(self, source: ActivationSource, divisor: Tensor) -> None:
        self.source, self.divisor = source, divisor
        self.hash = source.hash

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return self.source.n_rows

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """`(input, target / divisor)`."""
        x, target = self.source.batch(step, size)
        return x, target / self.divisor


def _require_fits(name: str, config: CoderConfig) -> None:
    if config.reads == config.writes:
        raise ConfigError(f"{name}: reads and writes {' + '.join(config.reads)}; coders of a set write to other hooks")
    if config.normalise.kind != "none":
        raise ConfigError(f"{name}: normalises each token ({config.normalise.kind}); a set's writes add up as they are")
