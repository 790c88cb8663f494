"""SIGKILL anywhere and the same command again: every byte is that of a build nobody disturbed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from index.builds import tree

SCRIPT = Path(__file__).parent / "killing.py"


def run(folder: Path, how: str, points: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), how, *points], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("how", ["build", "writer"])
def test_killed_anywhere_and_run_again(tmp_path: Path, how: str) -> None:
    (whole,) = run(tmp_path / "whole", how, ["0"])
    expected, events = tree(tmp_path / "whole" / "0"), whole["events"]
    assert events > 300  # opens, renames, links, locks …: enough places to die at
    draw = random.Random(how)
    step = events // (12 if how == "build" else 5)
    points = [str(draw.randint(first, first + step)) for first in range(1, events - step, step)]
    points += [str(events - n) for n in (1, 8, 20)]
    if how == "build":
        # Several deaths in a row, each of what the one before had left.
        points += ["+".join(str(draw.randint(20, 400)) for _ in range(4)) for _ in range(2)]
    report = run(tmp_path / "killed", how, points)
    assert sum(one["killed"][0] for one in report) >= len(points) - 3  # the last events may not come again
    for i, point in enumerate(points):
        assert tree(tmp_path / "killed" / str(i)) == expected, f"killed at event {point}"
    assert hidden(tmp_path / "killed") == []


def test_a_kill_leaves_the_older_index_in_place(tmp_path: Path) -> None:
    run(tmp_path, "writer", ["0"])
    before = tree(tmp_path / "0")
    code = f"""
import sys
sys.path[:0] = [{str(SCRIPT.parents[1])!r}, {str(SCRIPT.parents[2] / "src")!r}]
import index.killing as killing, index.builds, unmix.index.building, unmix.index.derive
from pathlib import Path
print(killing.child(Path({str(tmp_path / "0")!r}), "build", 900))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "-1"
    assert tree(tmp_path / "0") == before
    assert hidden(tmp_path) == [".0.building"]
