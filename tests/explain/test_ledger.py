"""The ledger: nothing lost, nothing done twice, no failure that looks like a result."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unmix.core.errors import CorruptError, ResumeError
from unmix.explain.ledger import Ledger, Method, Usage, alive, owner_of

METHOD = Method("c0de", "1dex", "layers.1", "ngram", "cfg")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def test_asking_twice_gives_the_same_rows(ledger: Ledger) -> None:
    first = ledger.ask_explanations(METHOD, [3, 5])
    assert ledger.ask_explanations(METHOD, [5, 3, 7])[:2] == first[::-1]
    other = Method("c0de", "1dex", "layers.1", "ngram", "another config")
    assert not set(ledger.ask_explanations(other, [3, 5])) & set(first)


def test_finished_work_is_not_claimed_again(ledger: Ledger) -> None:
    ids = ledger.ask_explanations(METHOD, [3, 5, 7])
    assert ledger.claim("explanations", ids) == ids
    assert ledger.claim("explanations", ids) == []
    ledger.finish_explanation(ids[0], "fires on cats", {"rules": [1]}, raw="reply", usage=Usage(10, 5, 0.5))
    ledger.fail("explanations", ids[1], ValueError("no JSON in the reply"), raw="sorry")
    assert ledger.claim("explanations", ids) == []
    assert ledger.claim("explanations", ids, retry=True) == [ids[1]]
    done, failed, running = ledger.explanations()
    assert (done.status, done.text, done.data) == ("done", "fires on cats", {"rules": [1]})
    assert (failed.status, failed.text, failed.attempts) == ("running", None, 2)
    assert running.status == "running"
    assert ledger.spent() == Usage(10, 5, 0.5)


def test_a_failure_keeps_its_class_and_reply_and_has_no_text(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(METHOD, [3])
    ledger.claim("explanations", [row])
    ledger.fail("explanations", row, ValueError("no JSON in the reply"), raw="sorry")
    entry = ledger.explanation(row)
    assert (entry.status, entry.text, entry.error_class, entry.error, entry.raw) == (
        "failed", None, "ValueError", "no JSON in the reply", "sorry",
    )  # fmt: skip


def test_an_empty_text_is_refused(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(METHOD, [3])
    with pytest.raises(ValueError, match="an empty text is a failure, not an explanation"):
        ledger.finish_explanation(row, "  \n")
    assert ledger.explanation(row).status == "pending"


def test_scores_belong_to_an_explanation(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(METHOD, [3])
    (score,) = ledger.ask_scores([row], "pattern", "cfg")
    assert ledger.ask_scores([row], "pattern", "cfg") == [score]
    ledger.claim("scores", [score])
    ledger.finish_score(score, {"f1": 0.5, "correlation": None})
    (entry,) = ledger.scores("pattern")
    assert (entry.explanation_id, entry.status, entry.figures) == (row, "done", {"f1": 0.5, "correlation": None})
    with pytest.raises(sqlite3.IntegrityError):
        ledger.ask_scores([999], "pattern", "cfg")


def test_a_score_that_is_not_finite_is_refused(ledger: Ledger) -> None:
    (row,) = ledger.ask_explanations(METHOD, [3])
    (score,) = ledger.ask_scores([row], "pattern", "cfg")
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.finish_score(score, {"f1": float("nan")})
    assert ledger.scores()[0].status == "pending"


def test_rows_of_a_dead_process_are_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    script = (
        "import os, signal, sys\n"
        "from unmix.explain.ledger import Ledger, Method\n"
        f"ledger = Ledger({str(path)!r})\n"
        "ids = ledger.ask_explanations(Method('c0de', '1dex', 'layers.1', 'ngram', 'cfg'), [3, 5])\n"
        "ledger.claim('explanations', ids)\n"
        "ledger.finish_explanation(ids[0], 'kept')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with Ledger(path) as ledger:
        ids = ledger.ask_explanations(METHOD, [3, 5])
        assert ledger.claim("explanations", ids) == [ids[1]]
        assert ledger.explanation(ids[0]).text == "kept"


def test_rows_of_a_living_process_are_left_alone(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "l.sqlite"), Ledger(tmp_path / "l.sqlite")
    ids = first.ask_explanations(METHOD, [1])
    assert first.claim("explanations", ids) == ids
    assert second.claim("explanations", ids) == []
    first.release("explanations", ids)
    assert second.claim("explanations", ids) == ids
    assert second.explanation(ids[0]).attempts == 1


def test_threads_share_a_ledger(ledger: Ledger) -> None:
    ids = ledger.ask_explanations(METHOD, range(40))
    taken: list[int] = []

    def work(part: list[int]) -> None:
        for row in ledger.claim("explanations", part):
            ledger.finish_explanation(row, f"text {row}")
            taken.append(row)

    threads = [threading.Thread(target=work, args=(ids,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ids


def test_owner_and_alive() -> None:
    import os

    assert alive(owner_of(os.getpid()))
    assert not alive(None)
    host, pid, _ = owner_of(os.getpid()).rsplit(":", 2)
    assert not alive(f"{host}:{pid}:1"), "the process id was given to another process"
    assert alive("another-machine:1:1")


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(CorruptError, match=r"l\.sqlite: cannot be read as a ledger"):
        Ledger(path)
    newer = tmp_path / "newer.sqlite"
    with Ledger(newer) as ledger:
        ledger._db.execute("insert into migrations (name) values ('9999-later')")
    with pytest.raises(ResumeError, match=r"made by a newer version \(migration '9999-later'\)"):
        Ledger(newer)
