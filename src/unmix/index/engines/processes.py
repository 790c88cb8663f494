"""Several processes of this machine, each with its own source. One that dies is replaced, and its shard done again."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from unmix.core.errors import ConfigError, MachineError
from unmix.index.orphans import die_with_parent
from unmix.index.sources.base import Open
from unmix.index.working import Work, work

DEATHS = 3
"""Deaths of workers that are borne, beyond one each."""


@dataclass
class _Worker:
    process: SpawnProcess
    channel: Connection
    turn: int
    finished: bool = False


def run(job: Work, open_source: Open, done: Callable[[int], None]) -> None:
    """Build the job's shards with `job.workers` processes.

    Raises:
        ConfigError: `open_source` cannot be sent to other processes.
        MachineError: workers die again and again.
        Exception: what a worker raised.
    """
    try:
        pickle.dumps(open_source)
    except Exception as error:
        raise ConfigError(
            f"{open_source!r} cannot be sent to worker processes ({error}): give a function of a module, or "
            "functools.partial of one with plain arguments, or workers=1"
        ) from error
    workers = [_start(job, open_source, turn) for turn in range(job.workers)]
    deaths = 0
    try:
        while running := [worker for worker in workers if not worker.finished]:
            ready = wait([worker.channel for worker in running])
            for worker in running:
                if worker.channel not in ready:
                    continue
                if _hear(worker, done):
                    continue
                deaths += 1
                if deaths > DEATHS + job.workers:
                    raise MachineError(_said_of(worker, deaths))
                workers[workers.index(worker)] = _start(job, open_source, worker.turn)
    finally:
        for worker in workers:
            if worker.process.is_alive() and not worker.finished:
                worker.process.terminate()
            worker.process.join()
            worker.channel.close()


def _start(job: Work, open_source: Open, turn: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(job, open_source, turn, theirs))
    process.start()
    theirs.close()
    return _Worker(process, ours, turn)


def _hear(worker: _Worker, done: Callable[[int], None]) -> bool:
    """Take one message; False where the worker died without one."""
    try:
        kind, content = worker.channel.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return False
    if kind == "shard":
        done(content)
    elif kind == "end":
        worker.finished = True
    else:
        raise content
    return True


def _said_of(worker: _Worker, deaths: int) -> str:
    code = worker.process.exitcode or 0
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return (
        f"worker processes died {deaths} times, the last one {how}; where memory is short, use fewer workers. "
        "What is built stays: the same command goes on from there"
    )


def _main(job: Work, open_source: Open, turn: int, channel: Connection) -> None:
    """A worker process. Ctrl-C is the parent's to hear: it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    try:
        work(job, open_source, turn=turn, done=lambda number: channel.send(("shard", number)))
        channel.send(("end", None))
    except Exception as error:
        channel.send(("error", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """The error itself, with where it came from; its text alone where it cannot travel."""
    where = traceback.format_exc()
    try:
        copy: Any = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}\n{where}")
    copy.add_note(f"raised in a worker process:\n{where}")
    return copy
