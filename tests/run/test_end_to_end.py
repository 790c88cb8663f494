"""The whole way of the data on a tiny model: run, kill in every stage, resume, same result to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from unmix.run.names import STAGE_NAMES

pytestmark = pytest.mark.slow

MAIN = (
    # A suite that runs in the background has SIGINT ignored, and children inherit that.
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from unmix.cli import main; sys.exit(main(sys.argv[1:]))"
)


def command(run_file: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", MAIN, "run", str(run_file), "--out", str(out), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def kill_in(stage: str, arguments: list[str], delay: float) -> bool:
    """Start, wait until `stage` begins, then SIGKILL after `delay` seconds. False where the run ended before."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    seen = False
    with process.stderr:
        for line in process.stderr:
            if line.startswith(f"{stage}: started"):
                seen = True
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
    process.wait()
    return seen


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def fingerprint(folder: Path) -> dict[str, Any]:
    """Everything a run's user reads, as comparable values. Times are left out: they are no result."""

    def digest(path: Path) -> str:
        """Of the content, the run's own place left out: the report says where the run lies."""
        return hashlib.sha256(path.read_bytes().replace(str(folder).encode(), b"RUN")).hexdigest()

    result: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        timed = name.startswith((".stages", ".lock", "ledger", "activations")) or "timings" in name
        if path.is_file() and not timed and path.name != "manifest.json":
            result[name] = digest(path)
    with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as db:
        tables = [row[0] for row in db.execute("select name from sqlite_master where type = 'table'")]
        result["ledger tables"] = sorted(tables)
    return result


def test_a_run_killed_in_every_stage_ends_as_if_it_never_was(run_file: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    whole = finish(command(run_file, straight))
    assert "CE recovered" in whole.stdout
    assert (straight / "report" / "index.html").is_file()
    assert not (straight / "activations").exists()
    gone = json.loads((straight / ".stages" / "activations.json").read_text(encoding="utf-8"))
    assert gone["key"] is None, "what is gone is not done"
    assert gone["seconds"] > 0
    inside: list[str] = []
    for i, stage in enumerate(STAGE_NAMES):
        assert kill_in(stage, command(run_file, broken), delay=0.05 * (i % 3)), f"{stage} never started"
        inside += [] if (broken / ".stages" / f"{stage}.json").is_file() else [stage]
    # Scoring a dozen latents can be over before the signal arrives; the others cannot.
    assert set(inside) >= set(STAGE_NAMES) - {"score", "index"}
    finish(command(run_file, broken))
    a, b = fingerprint(straight), fingerprint(broken)
    differing = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    assert differing == []


def test_a_second_call_does_nothing_and_a_changed_field_is_refused(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(command(run_file, out, "--until", "train"))
    again = finish(command(run_file, out, "--until", "train"))
    assert "started" not in again.stderr
    refused = subprocess.run(
        command(run_file, out, "--until", "train", "--train.lr", "0.01"),
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        f"unmix: {out}: stage 'train' was made by another config (train.lr: 0.0008 → 0.01); "
        "choose another --out, or say --redo train to replace it"
    )


def test_ctrl_c_ends_with_130_and_one_line(run_file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(run_file, tmp_path / "out"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env=environment(),
    )  # fmt: skip
    assert process.stderr is not None
    lines: list[str] = []
    with process.stderr:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("activations: started"):
                process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert lines[-1] == "unmix: interrupted; what was finished is kept, the same command goes on from there\n"
    assert not any("Traceback" in line for line in lines)


def test_two_processes_cannot_work_in_one_run(run_file: Path, tmp_path: Path) -> None:
    from unmix.core.lock import folder_lock

    out = tmp_path / "out"
    with folder_lock(out):
        refused = subprocess.run(command(run_file, out), capture_output=True, text=True, env=environment(), check=False)
    assert refused.returncode == 2
    assert f"another process (pid {os.getpid()}) is working in this run" in refused.stderr


def test_evaluation_file_is_plain_json(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(command(run_file, out, "--until", "evaluate"))
    figures = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert json.dumps(figures)
