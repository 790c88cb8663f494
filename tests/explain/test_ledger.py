"""The ledger: nothing lost, nothing done twice, no failure that looks like a result."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unmix.core.errors import ConfigError, CorruptError, ResumeError
from unmix.explain.clients.calls import Reply
from unmix.explain.ledger import Ledger
from unmix.explain.owners import is_gone, this_process
from unmix.explain.results import Draft, Figures
from unmix.explain.rows import ExplanationKey, ScoreKey


def keys(*latents: int, config: str = "cfg", sample: int = 0) -> list[ExplanationKey]:
    return [ExplanationKey("layers.1", "c0de", "1dex", i, "ngram", config, sample) for i in latents]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def test_asking_twice_gives_the_same_rows(ledger: Ledger) -> None:
    first = ledger.ask_explanations(keys(3, 5), {})
    assert ledger.ask_explanations(keys(5, 3, 7), {})[:2] == first[::-1]
    assert not set(ledger.ask_explanations(keys(3, 5, config="another"), {})) & set(first)
    assert not set(ledger.ask_explanations(keys(3, 5, sample=1), {})) & set(first)


def test_finished_work_is_not_claimed_again(ledger: Ledger) -> None:
    a, b, c = ledger.ask_explanations(keys(3, 5, 7), {"k": 1})
    assert [ledger.claim("explanations", i) for i in (a, b, c)] == [True, True, True]
    assert not ledger.claim("explanations", a)
    ledger.finish("explanations", a, Draft("fires on cats", {"rules": [1]}), [Reply("reply", 10, 5, 0.5)])
    ledger.fail("explanations", b, "BadReply", "no JSON in the reply", [Reply("sorry", 9, 1)])
    assert not any(ledger.claim("explanations", i) for i in (a, b))
    assert ledger.retry_failed("explanations", [a, b, c]) == 1
    assert ledger.claim("explanations", b)
    done, again, running = ledger.explanations()
    assert (done.status, done.text, done.data, done.raw) == ("done", "fires on cats", {"rules": [1]}, ["reply"])
    assert (done.prompt_tokens, done.completion_tokens, done.cost, done.config) == (10, 5, 0.5, {"k": 1})
    assert (again.status, again.text, again.attempts, again.prompt_tokens) == ("running", None, 2, 9)
    assert running.status == "running"


def test_a_failure_keeps_its_class_and_reply_and_has_no_text(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(keys(3), {})
    ledger.claim("explanations", row)
    ledger.fail("explanations", row, "BadReply", "no JSON in the reply", [Reply("sorry")])
    (entry,) = ledger.explanations(status="failed")
    assert (entry.text, entry.data, entry.error, entry.message, entry.raw) == (
        None, {}, "BadReply", "no JSON in the reply", ["sorry"],
    )  # fmt: skip


def test_the_schema_itself_refuses_a_failure_with_text_and_a_success_without(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(keys(3), {})
    (score,) = ledger.ask_scores([ScoreKey(row, "1dex", "pattern", "cfg")], {})
    for statement in (
        f"UPDATE explanations SET status = 'failed', error = 'X', text = 'a lie' WHERE id = {row}",
        f"UPDATE explanations SET status = 'done' WHERE id = {row}",
        f"UPDATE explanations SET status = 'failed' WHERE id = {row}",
        f"UPDATE scores SET status = 'failed', error = 'X', figures = '{{}}' WHERE id = {score}",
        f"UPDATE scores SET status = 'done' WHERE id = {score}",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
            ledger._db.execute(statement)


def test_a_blank_text_is_refused(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(keys(3), {})
    ledger.claim("explanations", row)
    with pytest.raises(ValueError, match="a blank text is a failure, not an explanation"):
        ledger.finish("explanations", row, Draft("  \n"))
    assert ledger.explanations()[0].status == "running"


def test_scores_belong_to_an_explanation(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(keys(3), {})
    key = ScoreKey(row, "1dex", "pattern", "cfg")
    (score,) = ledger.ask_scores([key], {})
    assert ledger.ask_scores([key], {}) == [score]
    ledger.claim("scores", score)
    ledger.finish("scores", score, Figures({"f1": 0.5, "pearson": None}, {"tokens": 9}))
    (entry,) = ledger.scores(method="pattern")
    assert (entry.explanation_id, entry.status, entry.figures) == (row, "done", {"f1": 0.5, "pearson": None})
    assert entry.counted == {"tokens": 9}
    with pytest.raises(sqlite3.IntegrityError):
        ledger._db.execute("UPDATE scores SET explanation_id = 999")


def test_a_score_that_is_not_finite_is_refused(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(keys(3), {})
    (score,) = ledger.ask_scores([ScoreKey(row, "1dex", "pattern", "cfg")], {})
    ledger.claim("scores", score)
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.finish("scores", score, Figures({"f1": float("nan")}))


def test_only_the_holder_ends_a_row(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(keys(3), {})
    with pytest.raises(ResumeError, match="is not held by this process"):
        ledger.finish("explanations", row, Draft("unasked"))
    assert ledger.explanations()[0].text is None


def test_rows_of_a_dead_process_are_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    script = (
        "import os, signal\n"
        "from unmix.explain.ledger import Ledger\n"
        "from unmix.explain.results import Draft\n"
        "from unmix.explain.rows import ExplanationKey\n"
        f"ledger = Ledger({str(path)!r})\n"
        "keys = [ExplanationKey('layers.1', 'c0de', '1dex', i, 'ngram', 'cfg') for i in (3, 5)]\n"
        "ids = ledger.ask_explanations(keys, {})\n"
        "[ledger.claim('explanations', i) for i in ids]\n"
        "ledger.finish('explanations', ids[0], Draft('kept'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with Ledger(path) as ledger:
        ids = ledger.ask_explanations(keys(3, 5), {})
        assert not ledger.claim("explanations", ids[1])
        assert ledger.adopt("explanations") == 1
        assert [ledger.claim("explanations", i) for i in ids] == [False, True]
        assert ledger.explanations(status="done")[0].text == "kept"


def test_rows_of_a_living_process_are_left_alone(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "l.sqlite"), Ledger(tmp_path / "l.sqlite")
    (row,) = first.ask_explanations(keys(1), {})
    assert first.claim("explanations", row)
    assert second.adopt("explanations") == 0
    assert not second.claim("explanations", row)
    first.release("explanations", row)
    assert second.claim("explanations", row)
    assert second.explanations()[0].attempts == 1


def test_threads_share_a_ledger(ledger: Ledger) -> None:
    ids = ledger.ask_explanations(keys(*range(40)), {})
    taken: list[int] = []

    def work() -> None:
        for row in ids:
            if ledger.claim("explanations", row):
                ledger.finish("explanations", row, Draft(f"text {row}"))
                taken.append(row)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ids


def test_whose_process_is_gone() -> None:
    own = this_process()
    assert not is_gone(own)
    host, pid, _ = own.rsplit(":", 2)
    assert int(pid) == os.getpid()
    assert is_gone(f"{host}:{pid}:1"), "the process id was given to another process"
    assert not is_gone("another-machine:1:1")


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(CorruptError, match=r"l\.sqlite: not a ledger, or a broken one"):
        Ledger(path)
    newer = tmp_path / "newer.sqlite"
    with Ledger(newer) as ledger:
        ledger._db.execute("INSERT INTO migrations VALUES ('9999_later', 'x')")
    with pytest.raises(ResumeError, match=r"made by a newer version of unmix \(step 9999_later\)"):
        Ledger(newer)


def test_reading_only_writes_nothing_and_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such ledger"):
        Ledger(tmp_path / "l.sqlite", read_only=True)
    assert not (tmp_path / "l.sqlite").exists()
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.ask_explanations(keys(3), {})
    with Ledger(tmp_path / "l.sqlite", read_only=True) as ledger:
        assert ledger.explanations()[0].latent == 3
        with pytest.raises(Exception, match="readonly"):
            ledger.claim("explanations", 1)


def test_an_unknown_column_is_named(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="explanations have no column 'latents'; they have attempts, coder,"):
        ledger.explanations(latents=3)
