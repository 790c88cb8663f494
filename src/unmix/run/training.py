"""The train stage: the run's coders, those that can share a stream of activations side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from unmix.coder.coder_set import CoderSet
from unmix.coder.config import CoderConfig
from unmix.core.atomic import write_json
from unmix.core.config import semantic_hash
from unmix.core.errors import ConfigError, NonFiniteError, ResumeError, did_you_mean
from unmix.core.policy import InputPolicy
from unmix.run.config import RunConfig
from unmix.run.context import RunContext
from unmix.run.team import wait_for_all
from unmix.train import retiring
from unmix.train.curves import write_curves
from unmix.train.feeds import Feed, HookFeed
from unmix.train.learner import Learner
from unmix.train.replay import NOTE, replay, saved_step
from unmix.train.rows import RowSource, RowStream
from unmix.train.sets import Hooks, SetFeed
from unmix.train.source import ActivationSource
from unmix.train.spliced import with_model
from unmix.train.store import LiveStore
from unmix.train.timing import Clock
from unmix.train.trackers import Session, Tracker, start_trackers
from unmix.train.trainer import SHARED, GroupTrainer, Job, make_terms, total_steps

DONE = "done.json"


def coder_configs(
    context: RunContext, policy: InputPolicy, training: Mapping[str, Any] | None = None
) -> dict[str, CoderConfig]:
    """Config of every coder of the run; `ConfigError` or `ModelError` where one cannot be on this model."""
    found: dict[str, CoderConfig] = {}
    for name, member in context.members.items():
        reads, writes = context.hooks[name]
        facts = {**(training or {}), "train": member.train.model_dump(mode="json")} if training else None
        found[name] = member.spec.model_copy(update={"name": name}).build(
            reads, writes, tuple(context.lm.width(hook) for hook in reads),
            tuple(context.lm.width(hook) for hook in writes), policy, context.lm.fingerprint, training=facts,
        )  # fmt: skip
    return found


def train_coders(context: RunContext) -> None:
    """Train every coder that is not done yet and save it; metrics, curves and checkpoints lie in `training/`."""
    if "train" in context.redo:
        for folder in (context.training_folder, *context.training_folder.glob("group-*")):
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            (folder / DONE).unlink(missing_ok=True)
        for note in context.training_folder.rglob(retiring.NOTE):
            note.unlink()
    facts = {"data": context.config.data.model_dump(mode="json"), "tokens_hash": context.shards.hash}
    configs = coder_configs(context, context.shards.policy, facts)
    mesh = context.mesh
    for i, (folder, names) in enumerate(groups(context).items()):
        if mesh is not None and i % mesh.coders != mesh.part:
            continue
        jobs = {name: Job(configs[name], context.members[name].train) for name in names}
        key = semantic_hash(context.keys["train"], context.store.hash, names)
        if _done(folder, key):
            continue
        train_group(context, jobs, folder, key)
        if not context.writes:
            continue
        write_json(folder / DONE, {"key": key})
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    if mesh is not None:
        wait_for_all(mesh)
    for folder in groups(context) if context.writes else ():
        (folder / DONE).unlink(missing_ok=True)  # the stage's own stamp takes over, and may be taken back


def train_group(context: RunContext, jobs: Mapping[str, Job], folder: Path, key: str) -> None:
    """Train the coders of one stream and save them. `NonFiniteError` says how to look at the step that failed."""
    clock = Clock()
    with ExitStack() as stack:
        trackers = _trackers(context, jobs, folder, key) if context.writes else []
        for tracker in trackers:
            stack.callback(tracker.finish)
        feed = stack.enter_context(feed_for(context, jobs, clock))
        try:
            trained = _trainer(context, jobs, feed, folder, key, clock, trackers).run()
        except NonFiniteError as error:
            if context.mesh is not None and context.mesh.size > 1:
                raise  # one process cannot take a step of several again
            raise NonFiniteError(f"{error} To look at it: unmix train {context.folder} --replay last") from error
        except ResumeError as error:
            raise ResumeError(f"{error}, or say --redo train to begin anew") from error
        for name in [name for name in jobs if name not in trained] if context.writes else []:
            shutil.rmtree(context.coder_folder(name), ignore_errors=True)  # of an earlier training
        if (together := context.config.coder_set) is not None and context.writes:
            CoderSet(trained).save(context.coder_folder(next(iter(trained))).parent)
        for name, coder in trained.items() if together is None else ():
            coder.save(context.coder_folder(name))
        asked = any(job.config.tracking.upload for job in jobs.values())
        for tracker in trackers if asked else ():
            if together is not None:
                tracker.upload(together, context.folder / "coders" / together)
            for name in trained if together is None else ():
                if jobs[name].config.tracking.upload:
                    tracker.upload(name, context.coder_folder(name))
    if context.writes:
        write_curves(folder, list(trained))


def _trainer(
    context: RunContext,
    jobs: Mapping[str, Job],
    feed: Feed,
    folder: Path,
    key: str,
    clock: Clock,
    trackers: list[Tracker],
) -> GroupTrainer:
    """The trainer of one process, or this rank's of a mesh."""
    if context.mesh is None or context.mesh.size == 1:
        measured = next(iter(jobs.values())).config.held_out > 0
        held_out = _held_out(context, jobs, clock) if measured else None
        return GroupTrainer(jobs, feed, folder, key, clock=clock, trackers=trackers, held_out=held_out)
    from unmix.train.parallel.trainer import MeshTrainer

    return MeshTrainer(jobs, feed, folder, key, context.mesh, clock=clock, trackers=trackers)


def replay_run(config: RunConfig, which: str) -> list[dict[str, Any]]:
    """Take the steps again that the training was stopped at; `which` is `last` for all, or one coder's name.

    `ConfigError` where there is no such step, or no such coder.
    """
    if config.out is None or not config.out.is_dir():
        raise ConfigError(f"{config.out}: no such run folder")
    context = RunContext(config, config.out, {})
    if which != "last" and which not in context.members:
        raise ConfigError(f"no coder {which!r}. {did_you_mean(which, ['last', *context.members])}")
    homes = groups(context)
    homes |= {folder / name: [name] for folder, names in groups(context).items() for name in names}
    folders = {
        folder: names for folder, names in homes.items()
        if (folder / NOTE).is_file() and (which == "last" or which in names)
    }  # fmt: skip
    if not folders:
        raise ConfigError(f"{config.out}: no step of this training went wrong, so there is none to take again")
    reports: list[dict[str, Any]] = []
    for folder, names in folders.items():
        saved = saved_step(folder)
        jobs = {name: Job(saved[name].config, context.members[name].train) for name in names if name in saved}
        with feed_for(context, jobs, Clock()) as feed:
            first = next(iter(jobs.values())).config
            steps = total_steps(first, feed.n_rows)
            learners = {
                name: Learner.resumed(saved[name], job.config, make_terms(job.coder, job.config), steps)
                for name, job in jobs.items()
            }
            report = replay(learners, feed, first.batch, folder)
        if which != "last":
            report["coders"] = {name: found for name, found in report["coders"].items() if name == which}
        reports.append(report)
    return reports


def groups(context: RunContext) -> dict[Path, list[str]]:
    """Names of the run's coders by the folder they are trained in: those that can share one stream share it.

    With `parallel.coders` they are dealt to so many teams.
    """
    parts: dict[str, list[str]] = {}
    for name, member in context.members.items():
        shared = semantic_hash([getattr(member.train, field) for field in SHARED])
        parts.setdefault(shared, []).append(name)
    teams = context.config.parallel.coders
    dealt = [names[i::teams] for names in parts.values() for i in range(teams) if names[i::teams]]
    if len(dealt) == 1:
        return {context.training_folder: dealt[0]}
    return {context.training_folder / f"group-{i + 1}": names for i, names in enumerate(dealt)}


def metrics_file(context: RunContext, name: str) -> Path:
    """The metrics of one coder."""
    folder = next(folder for folder, names in groups(context).items() if name in names)
    return folder / name / "metrics.jsonl"


def _held_out(context: RunContext, jobs: Mapping[str, Job], clock: Clock) -> Feed:
    """Rows of the role `score`, which is captured for the index and never trained on."""
    pairs = sorted({(job.coder.reads, job.coder.writes) for job in jobs.values()})
    hooks = [hook for pair in pairs for side in pair for hook in side]
    store, shards, seed = context.store, context.shards, context.config.seed
    stream = RowStream(store, shards, hooks, seed, "score", clock=clock)
    return rows_of(context, jobs, {pair: RowSource(store, shards, *pair, seed, stream=stream) for pair in pairs})


def rows_of(context: RunContext, jobs: Mapping[str, Job], sources: Mapping[Hooks, ActivationSource]) -> Feed:
    """Rows for coders that are trained side by side, or as one set."""
    if context.config.coder_set is None:
        return HookFeed(sources)
    return SetFeed({name: job.coder for name, job in jobs.items()}, sources)


@contextmanager
def feed_for(context: RunContext, jobs: Mapping[str, Job], clock: Clock) -> Generator[Feed]:
    """Rows of the captured activations for every job, one forward pass for those of every hook; or the model itself."""
    pairs = sorted({(job.coder.reads, job.coder.writes) for job in jobs.values()})
    hooks = [hook for pair in pairs for side in pair for hook in side]
    store, shards, seed = context.store, context.shards, context.config.seed
    if isinstance(store, LiveStore):
        store.clock = clock
    stream = RowStream(store, shards, hooks, seed, clock=clock)
    if context.config.capture.ahead:
        first = next(iter(jobs.values())).config
        draws = total_steps(first, stream.n_rows) * first.batch
        stride = 1 if context.mesh is None else context.mesh.data
        stream = RowStream(store, shards, hooks, seed, clock=clock, ahead=True, draws=draws, stride=stride)
    try:
        sources = {pair: RowSource(store, shards, *pair, seed, stream=stream) for pair in pairs}
        rows = rows_of(context, jobs, sources)
        yield with_model(rows, lambda: context.lm, shards, jobs, seed, clock)
    finally:
        stream.close()


def _done(folder: Path, key: str) -> bool:
    path = folder / DONE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("key") == key


def _trackers(context: RunContext, jobs: Mapping[str, Job], folder: Path, key: str) -> list[Tracker]:
    config = next(iter(jobs.values())).config
    settings = {
        "model": context.config.model.model_dump(mode="json"),
        "data": context.config.data.model_dump(mode="json"),
        "coders": {
            name: {
                "coder": job.coder.model_dump(mode="json", exclude={"training"}),
                "train": job.config.model_dump(mode="json"),
            }
            for name, job in jobs.items()
        },
    }
    name = f"{context.folder.name} {next(iter(jobs))}" if len(jobs) == 1 else f"{context.folder.name} ({len(jobs)})"
    return start_trackers(config.trackers, Session(name, key, folder, settings, config.tracking))
