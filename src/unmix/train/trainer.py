"""The trainer: one loop over one stream of activations, for one coder or for many.

State is each coder's weights, optimiser, firing counts, and one step number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unmix.coder.config import CoderConfig
from unmix.coder.sparse_coder import SparseCoder
from unmix.core.config import semantic_dict
from unmix.core.errors import ConfigError, DataError, MachineError, NonFiniteError
from unmix.core.progress import task
from unmix.train.averaging import update_average, use_average
from unmix.train.beginning import begin_with
from unmix.train.checkpoint import Checkpoints, Parts, TrainState
from unmix.train.config import OptimConfig, objective_of
from unmix.train.feeds import Feed, RowFeed
from unmix.train.guard import FaultError, Traceable, told
from unmix.train.held_out import measure
from unmix.train.learner import Learner, StepMetrics
from unmix.train.metrics_log import MetricsLog
from unmix.train.objectives import Step, Term, make_term
from unmix.train.replay import write_replay
from unmix.train.resampling import moments, require_resampling, resample
from unmix.train.retiring import back_again, may_leave, note_retired, retired
from unmix.train.source import ActivationSource
from unmix.train.stopping import deferred
from unmix.train.timing import Clock, summary
from unmix.train.trackers import Tracker
from unmix.train.watch import Watch, warn_of_outliers

log = logging.getLogger("unmix")
SHARED = ("batch", "tokens", "epochs")
"""Fields that coders of one stream must have in common."""


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

    def __init__(
        self,
        jobs: Mapping[str, Job],
        feed: Feed,
        folder: Path,
        key: str,
        *,
        clock: Clock | None = None,
        trackers: Sequence[Tracker] = (),
        held_out: Feed | None = None,
    ) -> None:
        """`key` is the hash of everything that the results depend on; a checkpoint of another key is refused.

        `clock` is the one that the feed's sources count their time with, `held_out` gives the rows that the config's
        field of that name measures on. `ConfigError` where the jobs disagree on what
        one stream must share: batch, tokens, epochs.
        """
        self.jobs, self.feed, self.folder, self.key = dict(jobs), feed, folder, key
        self.clock, self.trackers, self.held_out = clock or Clock(), trackers, held_out
        self.config = _shared(self.jobs)
        self.steps = total_steps(self.config, feed.n_rows)
        settings = {
            name: {"coder": semantic_dict(job.coder), "train": semantic_dict(job.config)}
            for name, job in self.jobs.items()
        }
        self.checkpoints = Checkpoints(folder / "checkpoint", key, settings, self.config.keep)
        for name, job in self.jobs.items():
            require_resampling(name, job.config)
        self._moments = {name: moments(job.config, self.steps) for name, job in self.jobs.items()}
        self.learners = self.begin()
        self._watches = {name: Watch(name, learner) for name, learner in self.learners.items()}

    def begin(self) -> dict[str, Learner]:
        """Every coder as the checkpoint left it, or fresh; those that left the training before it are not there."""
        found = self.checkpoints.load()
        learners: dict[str, Learner] = {}
        for name, job in self.jobs.items():
            if found is not None and name not in found:
                log.warning("%s left this training: %s", name, (retired(self._home(name)) or {}).get("reason"))
                continue
            back_again(self._home(name))
            terms = make_terms(job.coder, job.config)
            if found is None:
                source = self.feed.sample(job.coder)
                if job.config.start_from is None:
                    learners[name] = Learner.fresh(job.coder, source, job.config, terms, self.steps)
                else:
                    coder, variance = begin_with(job.coder, source, job.config)
                    state = TrainState(0, torch.zeros(coder.n_latents, dtype=torch.int64), variance)
                    learners[name] = Learner(coder, state, job.config, terms, self.steps)
                warn_of_outliers(name, source, job.config.init_rows)
            else:
                learners[name] = Learner.resumed(found[name], job.config, terms, self.steps)
        if found is not None and learners:
            log.info("train: goes on behind step %d of %d", next(iter(learners.values())).state.step, self.steps)
        return learners

    @property
    def at(self) -> int:
        """Steps done."""
        return next(iter(self.learners.values())).state.step

    def run(self) -> dict[str, SparseCoder]:
        """Train to the end and return the coders in evaluation mode.

        Raises `NonFiniteError` as soon as a number is not finite: nothing of that step is saved. Where that is
        some coders' own fault and their `retire` says so, they leave instead, and are not returned. Ctrl-C and
        SIGTERM let the step in hand end, save a checkpoint and raise `KeyboardInterrupt`. `MachineError` where the
        disk refuses says which checkpoint is left.
        """
        logs = {name: MetricsLog(self._log(name, "metrics.jsonl"), self.at) for name in self.learners}
        timings = MetricsLog(self.folder / "timings.jsonl", self.at)
        batch = self.config.batch
        with task("train", self.steps * batch, done=self.at * batch) as bar, deferred() as stopped:
            self.clock.reset()
            began, first = time.perf_counter(), self.at
            while self.at < self.steps:
                metrics = self.group_step()
                with self.clock.on("save"), self._keeping():
                    speed = (self.at - first) * batch / (time.perf_counter() - began)
                    if self._due(self.config.log_every) or self._held_out_due():
                        self._write(logs, metrics, speed)
                        spent = {part: round(seconds, 3) for part, seconds in self.clock.seconds().items()}
                        timings.write({"step": self.at, "tokens_per_second": round(speed, 1), "seconds": spent})
                    bar.advance(batch, _note(list(metrics.values()), speed))
                    stop = self.stopping(stopped())
                    if stop or (self.at % self.config.checkpoint_every == 0 and self.at < self.steps):
                        self.checkpoint()
                if stop:
                    log.info("stopped at step %d of %d, and saved", self.at, self.steps)
                    raise KeyboardInterrupt
            if self.at > first:
                log.info("train: %s", summary(time.perf_counter() - began, self.clock.seconds()))
        trained = {name: learner.finish() for name, learner in self.learners.items()}
        for learner in self.learners.values():
            use_average(learner)
        return trained

    def checkpoint(self) -> None:
        """Save the whole state of every coder at once."""
        self.checkpoints.save(self.at, self.parts())

    def kept(self) -> str:
        """In words, which checkpoint is there."""
        steps = self.checkpoints.steps()
        return f"the checkpoint of step {steps[0]} is kept" if steps else "no checkpoint was written yet"

    def stopping(self, asked: bool) -> bool:
        """Whether to stop after this step; `asked` says whether this process was told to."""
        return asked

    def parts(self) -> Parts:
        """What a checkpoint is made of."""
        return {name: (one.coder, one.optimiser, one.state) for name, one in self.learners.items()}

    def group_step(self) -> dict[str, StepMetrics]:
        """One optimiser step of every coder. All losses and gradients are checked before any weight is touched.

        A coder whose step is left out (`on_nonfinite: skip`) has no figures.
        """
        batches: dict[str, Step] = {}
        losses: dict[str, tuple[Tensor, dict[str, float]]] = {}
        faults: dict[str, FaultError] = {}
        with self.clock.on("coder"):
            for part in self.feed.steps(self.at, self.config.batch, self.learners):
                found: dict[str, tuple[Tensor, dict[str, float]]] = {}
                for name, batch in part.items():
                    try:
                        found[name] = self.learners[name].loss(batch)
                    except FaultError as fault:
                        faults[name] = fault
                if found:
                    torch.autograd.backward([loss for loss, _ in found.values()])
                batches |= part
                losses |= found
            for name in losses:
                try:
                    self.learners[name].clip()
                except FaultError as fault:
                    faults[name] = fault
            if faults:
                self._left_out(faults)
            result: dict[str, StepMetrics] = {}
            for name, (loss, values) in losses.items():
                if name not in faults:
                    result[name] = self.learners[name].apply(batches[name], float(loss.detach()), values)
                    self._watches[name].see(result[name])
            for name, learner in self.learners.items():
                self._after(name, learner)
        return result

    def _after(self, name: str, learner: Learner) -> None:
        """What follows a step at times: dead latents begun anew, and the mean of the weights."""
        if learner.state.step in self._moments[name] and resample(learner, self.feed.sample(learner.coder.config)):
            self._watches[name].restart()
        update_average(learner)

    def _left_out(self, faults: Mapping[str, FaultError]) -> None:
        """Count the steps that may be left out; otherwise note how to take this one again, and stop."""
        stop = [
            name
            for name in faults
            if self.jobs[name].config.on_nonfinite == "stop"
            or self.learners[name].state.skipped >= self.jobs[name].config.skip_limit
        ]
        places: dict[str, list[dict[str, int]]] = {}
        if stop and isinstance(self.feed, Traceable):
            size = self.config.batch
            places = {name: self.feed.places(self.at, size, fault.rows) for name, fault in faults.items()}
        if may_leave(stop, {name: self.jobs[name].config for name in self.learners}):
            for name, fault in faults.items():
                if name in stop:
                    self._retire(name, fault, places.get(name, []))
                else:
                    log.warning("%s: left out", fault)
                    self.learners[name].skip()
            return
        left = max(self.learners[name].state.skipped for name in stop)
        many = f" {left} steps were left out before, as many as skip_limit allows." if left else ""
        raise NonFiniteError(f"{told(faults, places)}{many}{self._kept_step(faults, places)}")

    def _retire(self, name: str, fault: FaultError, places: list[dict[str, int]]) -> None:
        """Let a coder go, its last good state kept for a closer look, and say so."""
        home, gone = self._home(name), self.learners.pop(name)
        with self._keeping():
            part = {name: (gone.coder, gone.optimiser, gone.state)}
            note = write_replay(home, self.key, part, {name: fault}, {name: places})
            note_retired(home, fault, places)
        log.warning(
            "%s: it leaves the training; others that go on: %d. The step is kept beside %s",
            fault, len(self.learners), note,
        )  # fmt: skip

    def _kept_step(self, faults: Mapping[str, FaultError], places: Mapping[str, list[dict[str, int]]]) -> str:
        """Keep what is needed to take the step again, and say where."""
        return f" The step is kept beside {write_replay(self.folder, self.key, self.parts(), faults, places)}"

    def _write(self, logs: Mapping[str, MetricsLog], metrics: Mapping[str, StepMetrics], speed: float) -> None:
        unseen: dict[str, dict[str, float]] = {}
        if self.held_out is not None and self._held_out_due():
            unseen = measure(self.learners, self.held_out, self.config.held_out)
        for name, log_file in logs.items():
            if name not in self.learners:
                continue
            skipped = self.learners[name].state.skipped
            record = {**(metrics[name].record() if name in metrics else {"step": self.at}), **unseen.get(name, {})}
            log_file.write({**record, "skipped": skipped} if skipped else record)
            prefix = f"{name}/" if len(logs) > 1 else ""
            for tracker in self.trackers:
                tracker.log(self.at, {f"{prefix}{key}": value for key, value in record.items() if key != "step"})
        for tracker in self.trackers:
            tracker.log(self.at, {"tokens": self.at * self.config.batch, "tokens_per_second": speed})

    def _due(self, every: int) -> bool:
        return self.at % every == 0 or self.at == self.steps

    def _held_out_due(self) -> bool:
        return self.held_out is not None and self.config.held_out > 0 and self._due(self.config.held_out_every)

    @contextmanager
    def _keeping(self) -> Generator[None]:
        """A disk that refuses ends the training; what is left of it is said."""
        try:
            yield
        except MachineError as error:
            raise MachineError(f"{error}; {self.kept()}, and the same command goes on from there") from error

    def _log(self, name: str, file: str) -> Path:
        return self._home(name) / file

    def _home(self, name: str) -> Path:
        """Where a coder's metrics lie."""
        return self.folder / name


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

    def _home(self, name: str) -> Path:
        return self.folder


def total_steps(config: OptimConfig, rows: int) -> int:
    """Optimiser steps of the whole training; `DataError` where there is less than one batch of rows."""
    if rows < config.batch:
        raise DataError(f"{rows} training rows are fewer than one batch of {config.batch}: take more text")
    tokens = config.tokens if config.tokens is not None else round(config.epochs * rows)
    return max(1, tokens // config.batch)


def _shared(jobs: Mapping[str, Job]) -> OptimConfig:
    """The config of the first job, which every other one must share where the stream is concerned."""
    first, *others = jobs.values()
    for field in SHARED:
        values = [getattr(job.config, field) for job in (first, *others)]
        if len(set(values)) > 1:
            raise ConfigError(f"coders of one stream must share {field}, found {', '.join(map(str, values))}")
    return first.config


def _note(metrics: list[StepMetrics], speed: float) -> str:
    """Figures beside the bar: of one coder, or the range over several."""
    rate = f"{speed / 1000:.1f}k tokens/s" if speed >= 1000 else f"{speed:.0f} tokens/s"
    if not metrics:
        return f"{rate} step left out"
    if len(metrics) == 1:
        one = metrics[0]
        return f"{rate} loss {one.loss:.3f} fvu {one.fvu:.3f} l0 {one.l0:.1f} dead {one.dead}"
    low, high = min(m.fvu for m in metrics), max(m.fvu for m in metrics)
    return f"{rate} {len(metrics)} coders, fvu {low:.3f} to {high:.3f}"
