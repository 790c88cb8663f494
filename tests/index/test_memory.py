"""A build keeps to its budget of memory, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, threading, time
sys.path[:0] = [{src!r}]
import numpy as np
from unmix.index.writer import IndexWriter
import unmix.index.sealing as sealing
from unmix.index.sources.arrays import ArrayCodes
sealing.derive = lambda *_: None

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

contexts, context, l0, F = 16, 128, 64, 4096
rng = np.random.default_rng(0)
rows = contexts * context
ids = (np.arange(l0) * (F // l0) + rng.integers(0, F // l0, (rows, l0))).astype(np.int32).reshape(-1)
codes = ArrayCodes(ids, rng.random(rows * l0, np.float32) + 1, np.arange(rows + 1) * l0, F)
most, base, running = 0, anonymous(), True

def watch():
    global most
    while running:
        most = max(most, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
with IndexWriter({folder!r}, {{"a": F, "b": F}}, context, budget_bytes={budget}) as writer:
    for _ in range({batches}):
        writer.add(np.zeros((contexts, context), int), codes={{"a": codes, "b": codes}})
running = False
print(most - base)
"""


def peak(tmp_path: Path, budget: int, batches: int) -> int:
    src = str(Path(__file__).parents[2] / "src")
    code = SCRIPT.format(src=src, folder=str(tmp_path / f"{budget}-{batches}"), budget=budget, batches=batches)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_budget_is_kept_whatever_the_token_count(tmp_path: Path) -> None:
    budget = 96 * 2**20
    few, many = peak(tmp_path, budget, 12), peak(tmp_path, budget, 48)  # 3 and 12.6 million postings: 25 and 100 MB
    assert max(few, many) < budget
    assert many < few + budget / 4
