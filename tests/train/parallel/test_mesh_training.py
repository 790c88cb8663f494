"""A mesh trains the coder that one process trains; where one rank dies, all stop, and a resume is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unmix.coder.native import load_native

from .ranks import KINDS, TIMEOUT, alone

MAIN = ("topk", "batchtopk", "jumprelu", "relu")
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
EQUAL = [
    *(f"{kind}:2:2:float64" for kind in KINDS),
    *(f"{kind}:2:1:float64" for kind in MAIN),
    *(f"{kind}:1:2:float64" for kind in MAIN),
    *(f"{kind}:2:2:float32" for kind in MAIN),
    "topk:1:4:float64",
]
KILLED = {
    "topk:2:2:float32:3@7": "topk:2:2:float32",
    "batchtopk:1:2:float64:0@12": "batchtopk:1:2:float64",
    "jumprelu:2:1:float64:1@7:0@11": "jumprelu:2:1:float64",
    "relu:1:2:float64:1@3": "relu:1:2:float64",
    "ema:2:2:float64:2@8": "ema:2:2:float64",
}
"""Cases with deaths and the same ones without."""
SILENT = "topk:1:2:float64:1@6!"


def place(root: Path, case: str) -> Path:
    """Where `ranks` puts a case."""
    return root / case.replace(":", "-").replace("@", "-").replace("!", "-")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Every case, trained in a process of its own that forks the ranks."""
    folder = tmp_path_factory.mktemp("mesh")
    command = [sys.executable, "-m", "train.parallel.ranks", str(folder), *EQUAL, *KILLED, SILENT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "tests")}
    done = subprocess.run(
        command, cwd=root / "tests", env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`(coder, metrics)` of one process, by kind and dtype."""
    made: dict[tuple[str, str], tuple[Any, list[dict[str, Any]]]] = {}

    def train(kind: str, dtype: str) -> tuple[Any, list[dict[str, Any]]]:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("single")
            torch.set_default_dtype(getattr(torch, dtype))
            try:
                coder = alone(kind, folder).run()["it"]
            finally:
                torch.set_default_dtype(torch.float32)
            made[kind, dtype] = coder, metrics(folder)
        return made[kind, dtype]

    return train


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Its log."""
    return [json.loads(line) for line in (folder / "it" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def problems(folder: Path) -> str:
    """What ranks said."""
    return "\n".join(f"{file.name}: {file.read_text(encoding='utf-8')}" for file in sorted(folder.glob("rank-*.txt")))


@pytest.mark.parametrize("case", EQUAL)
def test_a_mesh_trains_what_one_process_trains(trained: Path, single: Any, case: str) -> None:
    """Weights, thresholds and every figure of the log, to the rounding of sums in another order."""
    kind, _, _, dtype = case.split(":")
    folder, tolerance = place(trained, case), TOLERANCE[dtype]
    assert (folder / "coder").is_dir(), problems(folder)
    coder, found = single(kind, dtype)[0], load_native(folder / "coder")
    assert found.config == coder.config
    for name, tensor in coder.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    for mine, theirs in zip(metrics(folder), single(kind, dtype)[1], strict=True):
        assert mine == pytest.approx(theirs, rel=10 * tolerance, abs=10 * tolerance)
    assert (metrics(folder)[-1].get("skipped", 0) > 0) == (kind == "topk-bad")
    assert any(line["dead"] for line in metrics(folder)) or kind not in ("topk", "batchtopk")


@pytest.mark.parametrize("case", KILLED)
def test_a_dead_rank_stops_all_and_the_next_start_goes_on(trained: Path, case: str) -> None:
    """The others end with code 3 well before the timeout; the resumed coder and log are those of an unbroken run."""
    folder, whole = place(trained, case), place(trained, KILLED[case])
    *broken, last = json.loads((folder / "ends.json").read_text(encoding="utf-8"))
    for moment, ends in zip(case.split(":")[4:], broken, strict=True):
        victim = int(moment.split("@")[0])
        for rank, (code, seconds) in enumerate(ends):
            assert code == (-9 if rank == victim else 3), problems(folder)
            assert seconds < 2 * TIMEOUT + 10
    assert [code for code, _ in last] == [0] * len(last), problems(folder)
    assert load_native(folder / "coder").hash() == load_native(whole / "coder").hash()
    assert metrics(folder) == metrics(whole)
    assert "The same command goes on from the last checkpoint" in problems(folder)


def test_a_rank_that_stands_still_is_given_up(trained: Path) -> None:
    """After the timeout, with a message; the next start goes on."""
    folder = place(trained, SILENT)
    first, last = json.loads((folder / "ends.json").read_text(encoding="utf-8"))
    assert first[0][0] == 3
    assert TIMEOUT < first[0][1] < 2 * TIMEOUT + 10
    assert "rank 0 of 2: another process is gone or silent, noticed while" in problems(folder)
    assert [code for code, _ in last] == [0, 0]
    assert load_native(folder / "coder").hash() == load_native(place(trained, "topk:1:2:float64") / "coder").hash()
