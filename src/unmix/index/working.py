"""What every process of a build does: take a shard that nobody has, build it, merge the groups that are whole."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unmix.index.claims import claim
from unmix.index.frame import Taken
from unmix.index.groups import close_group
from unmix.index.plan import Plan
from unmix.index.shards import build_shard, shard_claim, shard_stands
from unmix.index.sources.base import Open, Source
from unmix.index.space import check_space, estimate, l0_of

log = logging.getLogger("unmix")
WAIT = 0.05
LONGEST_WAIT = 2.0
"""Seconds between looks at shards that other processes are building."""
SAID_AFTER = 60.0
"""Seconds of waiting after which it is said what for."""


@dataclass(frozen=True)
class Work:
    """What a process of a build is told; plain, so that it travels."""

    building: Path
    numbers: tuple[int, ...]
    """The shards of this job."""
    budget_bytes: int
    """Of this process alone."""
    workers: int = 1
    parts: int | None = None
    """How many parts there are, where this job is one that leaves its shards to be joined."""
    threads: int | None = None
    """Torch's threads in each process."""


def work(
    job: Work,
    open_source: Open,
    source: Source | None = None,
    turn: int = 0,
    done: Callable[[int], None] = lambda number: None,
) -> None:
    """Build every shard of the job that is not there; return when all are, whoever built them.

    Nothing is divided beforehand: each process takes the next free shard, from its own `turn` on. One that another
    process holds is waited for and, should that process die, built here. `done` hears of each shard built here.
    """
    plan = Plan.read(job.building)
    left, wait, waited = list(job.numbers), WAIT, 0.0
    start = turn * len(left) // max(job.workers, 1)
    left = left[start:] + left[:start]
    asked = _Asked(job, plan)
    while left:
        before = len(left)
        for number in list(left):
            if not shard_stands(job.building, plan, number):
                with claim(shard_claim(job.building, number)) as mine:
                    if not mine:
                        continue
                    if not shard_stands(job.building, plan, number):
                        source = source if source is not None else open_here(open_source, job.threads)
                        build_shard(job.building, plan, number, source, job.budget_bytes, asked)
                        done(number)
            left.remove(number)
            # Other parts' shards may have lain here for days; those of this job were hashed when it began.
            check = job.parts is not None
            close_group(job.building, plan, number // plan.cut.group, job.budget_bytes, check)
        if left:
            wait = WAIT if len(left) < before else min(2 * wait, LONGEST_WAIT)
            if waited < SAID_AFTER <= waited + wait:
                log.info("waiting for %d shards that other processes are building, as shard %d", len(left), left[0])
            waited += wait
            time.sleep(wait)


def open_here(open_source: Open, threads: int | None) -> Source:
    """The source, opened in this process, with the job's number of threads."""
    source = open_source()
    if threads is not None and "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
    return source


class _Asked:
    """Compares the need of disk with what is free, once, when the first batch says how dense the codes are."""

    def __init__(self, job: Work, plan: Plan) -> None:
        self._job, self._plan, self._asked = job, plan, False

    def __call__(self, taken: Taken) -> None:
        if not self._asked:
            self._asked = True
            need = estimate(self._plan, l0_of(taken), self._job.workers, self._job.parts)
            check_space(self._job.building, need)
