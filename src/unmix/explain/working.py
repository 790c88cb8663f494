"""Taking rows, doing them, ending them: here and now, or by asking a language model about many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from unmix.core.progress import Task
from unmix.explain.clients.calls import CallError, Client, Reply, Request
from unmix.explain.ledger import Ledger, Table
from unmix.explain.results import Draft, Figures, LatentError, Question

GIVE_UP = 8
"""Rows in a row that fail because of the service, after which it is taken to be gone."""


@dataclass(frozen=True)
class Job:
    """A row and how its result (or the question that leads to it) comes about."""

    id: int
    run: Callable[[], Draft | Figures | Question]


def work(
    ledger: Ledger, table: Table, jobs: Sequence[Job], client: Client | None, bar: Task, retry_failed: bool
) -> None:
    """Do every job whose row is pending, orphaned by a dead process, or (with `retry_failed`) failed."""
    ids = [job.id for job in jobs]
    ledger.adopt(table)
    if retry_failed:
        ledger.retry_failed(table, ids)
    states = ledger.states(table, ids)
    todo = [job for job in jobs if states[job.id][0] == "pending"]
    bar.advance(len(jobs) - len(todo))
    if not todo:
        return
    if client is None:
        _compute(ledger, table, todo, bar)
    else:
        client.probe()
        _ask(ledger, table, todo, client, bar)


def _compute(ledger: Ledger, table: Table, jobs: Sequence[Job], bar: Task) -> None:
    for job in jobs:
        if not ledger.claim(table, job.id):
            continue
        try:
            result = job.run()
            assert not isinstance(result, Question), "a question without a client"
            ledger.finish(table, job.id, result)
        except LatentError as failure:
            ledger.fail(table, job.id, failure.kind, str(failure))
        except BaseException:
            ledger.release(table, job.id)
            raise
        bar.advance()


def _ask(ledger: Ledger, table: Table, jobs: Sequence[Job], client: Client, bar: Task) -> None:
    held: dict[int, Question] = {}

    def questions() -> Iterator[tuple[int, Sequence[Request]]]:
        for job in jobs:
            if not ledger.claim(table, job.id):
                continue
            try:
                question = job.run()
            except LatentError as failure:
                ledger.fail(table, job.id, failure.kind, str(failure))
                bar.advance()
                continue
            except BaseException:
                ledger.release(table, job.id)
                raise
            assert isinstance(question, Question), "a result where a question was due"
            held[job.id] = question
            yield job.id, question.requests

    streak = 0
    try:
        for id, answer in client.answers(questions()):
            if isinstance(answer, CallError):
                if answer.fatal:
                    raise answer
                ledger.fail(table, id, answer.kind, str(answer))
                streak += 1
                if streak >= GIVE_UP:
                    raise CallError(answer.kind, f"{streak} in a row failed, the last: {answer}. "
                                    "What was not done stays pending: run again when the service is back",
                                    answer.status, fatal=True)  # fmt: skip
            else:
                streak = 0
                _end(ledger, table, id, held[id], answer)
            del held[id]
            bar.advance()
    finally:
        for id in held:
            ledger.release(table, id)


def _end(ledger: Ledger, table: Table, id: int, question: Question, replies: list[Reply]) -> None:
    try:
        result = question.read([reply.text for reply in replies])
    except LatentError as failure:
        ledger.fail(table, id, failure.kind, str(failure), replies)
    else:
        ledger.finish(table, id, result, replies)
