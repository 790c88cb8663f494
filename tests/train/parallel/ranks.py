"""Trains on meshes of forked processes; run as `python -m … FOLDER CASE …`.

A case is `KIND:DATA:DICTIONARY:DTYPE[:MOMENT …]`, a moment `RANK@STEP` (that rank dies by SIGKILL once the step is
done), `RANK@STEP!` (it stands still instead) or `never`. One team of processes after another dies at its moment; the
last one runs to the end. Writes `FOLDER/CASE/coder`, `metrics.jsonl`, and `ends.json`: for each team the exit code of
every rank and the seconds until it was gone. One process imports torch once for all of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.toys import planted
from unmix.core.errors import UnmixError
from unmix.train.config import OptimConfig
from unmix.train.feeds import RowFeed
from unmix.train.parallel.config import ParallelConfig
from unmix.train.parallel.mesh import Mesh, Team
from unmix.train.parallel.trainer import MeshTrainer
from unmix.train.source import TensorSource
from unmix.train.trainer import GroupTrainer, Job

TIMEOUT = 4.0
"""Seconds that a rank waits for a silent one."""
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": ({"activation": {"kind": "topk", "k": 3}}, {}),
    "topk-norm": (
        {"activation": {"kind": "topk", "k": 3, "relu": "before"}, "gate_space": "decoder_norm", "pre_bias": "own"},
        {"unit_norm": False},
    ),
    "topk-signed": ({"activation": {"kind": "topk", "k": 3, "relu": "none", "magnitude": True}}, {"k_start": 8}),
    "batchtopk": ({"activation": {"kind": "batchtopk", "k": 3}}, {}),
    "jumprelu": (
        {"activation": {"kind": "jumprelu", "initial_threshold": 0.3, "bandwidth": 0.5}}, {"sparsity": 0.01}
    ),
    "jumprelu-target": (
        {"activation": {"kind": "jumprelu", "initial_threshold": 0.3, "bandwidth": 0.5}},
        {"sparsity": 0.1, "target_l0": 4.0},
    ),
    "topk-bad": ({"activation": {"kind": "topk", "k": 3}}, {"on_nonfinite": "skip"}),
    "relu": ({"activation": {"kind": "relu"}}, {"sparsity": 0.01}),
    "ema": ({"activation": {"kind": "topk", "k": 3}}, {"ema": 0.8}),
    "transcoder": (
        {"activation": {"kind": "topk", "k": 3}, "reads": ("a",), "writes": ("b",), "d_out": 5, "pre_bias": "none",
         "skip": True}, {},
    ),
}  # fmt: skip


def job(kind: str) -> Job:
    """A coder of 48 latents and how it is trained: 15 steps of 32 rows, a checkpoint every fifth."""
    from unmix.coder.config import CoderConfig

    coder, optim = KINDS[kind]
    settings = {
        "batch": 32, "tokens": 480, "init_rows": 64, "lr": 5e-3, "checkpoint_every": 5, "log_every": 3,
        "dead_after": 96, "clip": 0.5, "k_aux": 6, **optim,
    }  # fmt: skip
    return Job(CoderConfig.model_validate({"d_in": 8, "n_latents": 48, **coder}), OptimConfig.model_validate(settings))


def feed(kind: str) -> RowFeed:
    """400 rows of a planted dictionary; in `topk-bad` one of the fourth step, which some ranks never see, is NaN."""
    x = planted(400, 8, 12, 2)[0].float()
    if kind == "topk-bad":
        x[int(TensorSource(x)._order.batch(3, 32)[4]), 2] = float("nan")
    wide = "d_out" in KINDS[kind][0]
    return RowFeed(TensorSource(x, x[:, :5] * 2 + 1 if wide else None))


def alone(kind: str, folder: Path) -> GroupTrainer:
    """The trainer of one process."""
    return GroupTrainer({"it": job(kind)}, feed(kind), folder, "key")


def team(kind: str, data: int, dictionary: int, folder: Path, moment: str) -> None:
    """One rank's life."""
    who, _, when = moment.partition("@")
    found = Team.found()
    assert found is not None
    mesh = Mesh(found, ParallelConfig(data=data, dictionary=dictionary, timeout=TIMEOUT))
    trainer = MeshTrainer({"it": job(kind)}, feed(kind), folder, "key", mesh)
    if moment != "never" and mesh.rank == int(who):
        step: Callable[..., Any] = trainer.group_step

        def counted() -> Any:
            result = step()
            if trainer.at == int(when.rstrip("!")):
                os.kill(os.getpid(), signal.SIGSTOP if when.endswith("!") else signal.SIGKILL)
            return result

        trainer.group_step = counted
    for coder in trainer.run().values():
        coder.save(folder / "coder")
    mesh.close()


def launch(case: str, folder: Path, moment: str) -> list[tuple[int, float]]:
    """Fork the ranks; `(exit code or minus the signal, seconds)` of each."""
    kind, data, dictionary, dtype, *_ = case.split(":")
    size = int(data) * int(dictionary)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: dict[int, int] = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            os._exit(live(kind, int(data), int(dictionary), dtype, folder, moment))
        children[pid] = rank
    began, ends = time.monotonic(), [(0, 0.0)] * size
    while children:
        pid, status = os.wait()
        ends[children.pop(pid)] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
        if moment.endswith("!") and len(children) == 1:
            for stopped in children:
                os.kill(stopped, signal.SIGKILL)
    return ends


def live(kind: str, data: int, dictionary: int, dtype: str, folder: Path, moment: str) -> int:
    """Exit code of one rank; its errors go to a file."""
    torch.set_default_dtype(getattr(torch, dtype))
    problems = folder / f"rank-{os.environ['RANK']}.txt"
    try:
        team(kind, data, dictionary, folder, moment)
    except UnmixError as error:
        problems.write_text(str(error), encoding="utf-8")
        return error.exit_code
    except BaseException:
        problems.write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    return 0


def main(root: Path, cases: list[str]) -> None:
    """Every case, one after the other."""
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # the disk is slow, and a killed process loses nothing that it wrote
    alone("topk", root / "warm").run()  # what torch imports late, once for all children
    for case in cases:
        folder = root / case.replace(":", "-").replace("@", "-").replace("!", "-")
        folder.mkdir(parents=True)
        moments = case.split(":")[4:]
        ends = [launch(case, folder, moment) for moment in [*moments, "never"]]
        (folder / "ends.json").write_text(json.dumps(ends), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
