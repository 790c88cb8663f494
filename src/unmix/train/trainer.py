"""The trainer: one loop over one stream of activations, for one coder or for many.

State is each coder's weights, optimiser, firing counts, and one step number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.atomic import sweep
from unmix.core.errors import ConfigError, DataError
from unmix.core.progress import task
from unmix.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from unmix.train.config import OptimConfig, objective_of
from unmix.train.feeds import Feed, RowFeed
from unmix.train.learner import Learner, StepMetrics
from unmix.train.metrics_log import MetricsLog
from unmix.train.objectives import Term, make_term
from unmix.train.source import ActivationSource


@dataclass(frozen=True)
class Job:
    """One coder to be trained."""

    coder: CoderConfig
    config: OptimConfig


def make_terms(coder: CoderConfig, config: OptimConfig) -> list[Term]:
    """The objective of a coder: the terms it was given, or the local default."""
    return [make_term(spec, coder) for spec in objective_of(coder.activation.kind, config)]


class GroupTrainer:
    """Trains several coders on one stream, step by step together; resumes by itself from `folder/checkpoint`."""

    def __init__(self, jobs: Mapping[str, Job], feed: Feed, folder: Path, key: str) -> None:
        """`key` is the hash of everything that the results depend on; a checkpoint of another key is refused.

        `ConfigError` where the jobs disagree on what one stream must share: batch, tokens, epochs.
        """
        self.jobs, self.feed, self.folder, self.key = dict(jobs), feed, folder, key
        self.config = _shared(self.jobs)
        self.steps = total_steps(self.config, feed.n_rows)
        sweep(folder / "checkpoint")
        found = load_checkpoint(folder / "checkpoint", key)
        self.learners: dict[str, Learner] = {}
        for name, job in self.jobs.items():
            terms = make_terms(job.coder, job.config)
            if found is None:
                source = feed.sample(job.coder)
                self.learners[name] = Learner.fresh(job.coder, source, job.config, terms, self.steps)
            else:
                self.learners[name] = Learner.resumed(found[name], job.config, terms, self.steps)

    @property
    def at(self) -> int:
        """Steps done."""
        return next(iter(self.learners.values())).state.step

    def run(self) -> dict[str, SparseCoder]:
        """Train to the end and return the coders in evaluation mode.

        Raises `NonFiniteError` as soon as a loss is not finite: nothing of that step is saved.
        """
        logs = {name: MetricsLog(self._log(name, "metrics.jsonl"), self.at) for name in self.learners}
        timings = MetricsLog(self.folder / "timings.jsonl", self.at)
        batch = self.config.batch
        with task("train", self.steps * batch, done=self.at * batch) as bar:
            began, first = time.monotonic(), self.at
            while self.at < self.steps:
                metrics = self.group_step()
                if self.at % self.config.log_every == 0 or self.at == self.steps:
                    for name, log in logs.items():
                        log.write(metrics[name].record())
                    speed = (self.at - first) * batch / (time.monotonic() - began)
                    timings.write({"step": self.at, "tokens_per_second": round(speed, 1)})
                bar.advance(batch, _note(list(metrics.values())))
                if self.at % self.config.checkpoint_every == 0 and self.at < self.steps:
                    self.checkpoint()
        return {name: learner.coder.eval() for name, learner in self.learners.items()}

    def checkpoint(self) -> None:
        """Save the whole state of every coder at once."""
        parts = {name: (one.coder, one.optimiser, one.state) for name, one in self.learners.items()}
        save_checkpoint(self.folder / "checkpoint", self.key, parts)

    def group_step(self) -> dict[str, StepMetrics]:
        """One optimiser step of every coder. All losses and gradients are checked before any weight is touched."""
        batches = self.feed.steps(self.at, self.config.batch, self.learners)
        losses = {name: self.learners[name].loss(batch) for name, batch in batches.items()}
        torch.autograd.backward([loss for loss, _ in losses.values()])
        for learner in self.learners.values():
            learner.clip()
        return {
            name: self.learners[name].apply(batches[name], float(loss.detach()), values)
            for name, (loss, values) in losses.items()
        }

    def _log(self, name: str, file: str) -> Path:
        return self.folder / name / file


class Trainer(GroupTrainer):
    """Trains one coder on one source of rows."""

    def __init__(self, coder: CoderConfig, source: ActivationSource, config: OptimConfig, folder: Path, key: str):
        """See `GroupTrainer`."""
        self.source = source
        super().__init__({coder.name: Job(coder, config)}, RowFeed(source), folder, key)
        self.learner = self.learners[coder.name]

    def run(self) -> SparseCoder:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Train to the end and return the coder in evaluation mode."""
        return next(iter(super().run().values()))

    @property
    def coder(self) -> SparseCoder:
        """The coder as it stands."""
        return self.learner.coder

    @property
    def state(self) -> TrainState:
        """Its counters."""
        return self.learner.state

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        """Its optimiser."""
        return self.learner.optimiser

    def step(self) -> StepMetrics:
        """One optimiser step."""
        return next(iter(self.group_step().values()))

    def _log(self, name: str, file: str) -> Path:
        return self.folder / file


def total_steps(config: OptimConfig, rows: int) -> int:
    """Optimiser steps of the whole training; `DataError` where there is less than one batch of rows."""
    if rows < config.batch:
        raise DataError(f"{rows} training rows are fewer than one batch of {config.batch}: take more text")
    tokens = config.tokens if config.tokens is not None else round(config.epochs * rows)
    return max(1, tokens // config.batch)


def _shared(jobs: Mapping[str, Job]) -> OptimConfig:
    """The config of the first job, which every other one must share where the stream is concerned."""
    first, *others = jobs.values()
    for field in ("batch", "tokens", "epochs", "log_every", "checkpoint_every"):
        values = [getattr(job.config, field) for job in (first, *others)]
        if len(set(values)) > 1:
            raise ConfigError(f"coders of one stream must share {field}, found {', '.join(map(str, values))}")
    return first.config


def _note(metrics: list[StepMetrics]) -> str:
    """Figures beside the bar: of one coder, or the range over several."""
    if len(metrics) == 1:
        return f"fvu {metrics[0].fvu:.3f} l0 {metrics[0].l0:.1f} dead {metrics[0].dead}"
    low, high = min(m.fvu for m in metrics), max(m.fvu for m in metrics)
    return f"{len(metrics)} coders, fvu {low:.3f} to {high:.3f}"
