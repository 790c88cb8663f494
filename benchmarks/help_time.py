"""How long `import unmix` and `unmix --help` take, against an interpreter that does nothing.

python -m benchmarks.help_time [--rounds 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._timing import Spread, alternate, machine, speedup, table
from benchmarks._worker import ROOT

BASE = "python -c pass"


def runner(command: list[str]) -> Callable[[], float]:
    """A contestant that runs `command` in a fresh process."""

    def run() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return time.perf_counter() - start

    return run


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    python = sys.executable
    commands = {
        BASE: [python, "-c", "pass"],
        "import unmix": [python, "-c", "import unmix"],
        "unmix --help": [str(Path(python).parent / "unmix"), "--help"],
        "import torch": [python, "-c", "import torch"],
    }
    times = alternate({name: runner(command) for name, command in commands.items()}, options.rounds, warmup=2)
    rows = [[name, Spread.of(times[name]).show(0, 1000), speedup(times, BASE, name).show(1)] for name in times]
    print(f"Measured on {machine()}; medians of {options.rounds} shuffled rounds (10th–90th percentile).\n")
    print(table(["", "ms", f"times {BASE}"], rows))


if __name__ == "__main__":
    main()
