"""A Ray cluster: the same shards, taken by actors on any of its machines, which must see the same building folder.

Ray starts an actor that died again and repeats what it was doing; a shard is whole or absent, so nothing is lost.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from unmix.core.errors import MachineError, missing_extra
from unmix.index.sources.base import Open, Source
from unmix.index.working import Work, open_here, work

RETRIES = 3
"""How often one actor is started again, and one shard begun again."""


class ShardBuilder:
    """What an actor does: build one shard after the other with a source of its own."""

    def __init__(self, job: Work, open_source: Open) -> None:
        self._job, self._open, self._source = job, open_source, None

    def build(self, number: int) -> int:
        """Build a shard that is not there; its number."""
        source: Source = self._source if self._source is not None else open_here(self._open, self._job.threads)
        self._source = source
        work(replace(self._job, numbers=(number,)), self._open, source)
        return number


def run(job: Work, open_source: Open, done: Callable[[int], None]) -> None:
    """Build the job's shards with `job.workers` actors. Uses the cluster of `RAY_ADDRESS`, or starts one here.

    Raises:
        MachineError: Ray is not installed, or an actor died more often than it is started again.
        Exception: what an actor raised.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise missing_extra("ray", "ray", "indexing on a Ray cluster") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        _spread(ray, job, open_source, done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError as error:
        raise MachineError(
            f"an indexing actor died more than {RETRIES} times ({_first_line(error)}); what is built stays: the same "
            "command goes on from there"
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _spread(ray: Any, job: Work, open_source: Open, done: Callable[[int], None]) -> None:
    """Hand out shards one by one, so that a slow actor holds nobody up."""
    remote = ray.remote(num_cpus=1, max_restarts=RETRIES, max_task_retries=RETRIES)(ShardBuilder)
    waiting = list(reversed(job.numbers))
    running = {}
    for actor in [remote.remote(job, open_source) for _ in range(job.workers)]:
        if waiting:
            running[actor.build.remote(waiting.pop())] = actor
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        actor = running.pop(ready[0])
        done(ray.get(ready[0]))
        if waiting:
            running[actor.build.remote(waiting.pop())] = actor


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
