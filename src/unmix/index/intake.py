"""Checked batches → token files and sorted runs, within a budget of memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from unmix.core.atomic import disk_errors
from unmix.index.frame import Frame, Taken
from unmix.index.layout import write_raw
from unmix.index.runs import BLOCK, Run, RunBuffer

WEAVING = 64 * 2**20
"""Bytes that weaving takes beside what the buffers hold."""


def runs_of(folder: Path, base: int, n_latents: int) -> list[Run]:
    """The runs of one coder in its folder of a shard, in order of position."""
    found = sorted(folder.glob("run-*"), key=lambda run: int(run.name.removeprefix("run-")))
    return [Run(run, base, n_latents) for run in found]


class Intake:
    """Appends batches to token files in `folder`; runs go where `write_runs` is told to, positions from `base`."""

    def __init__(self, folder: Path, frame: Frame, budget_bytes: int, runs: Path, base: int = 0) -> None:
        self._frame, self._folder = frame, folder
        self.base, self.runs = base, runs
        """The global position that the next run's count from, and the shard's folder for the runs of all coders."""
        self._spare = max(budget_bytes - WEAVING, budget_bytes // 4)
        block = self._spare // (64 * len(frame.latents))
        # A block has 4 bytes for each latent beside its postings: it must not be much smaller than the coder is wide.
        self._buffers = {name: RunBuffer(n, min(max(block, n // 8, 16), BLOCK)) for name, n in frame.latents.items()}
        self._written = 0
        self.contexts = 0
        """Contexts taken since the start."""
        self._stack = ExitStack()
        with disk_errors(folder):
            self._files: dict[str, BinaryIO] = {
                name: self._stack.enter_context((folder / name).open("wb")) for name in frame.token_files
            }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, taken: Taken, first: int) -> None:
        """Append a batch whose first context is number `first` of the index. What overflows the budget is written."""
        with disk_errors(self._folder):
            for name, array in taken.files.items():
                write_raw(self._files[name], array)
        start = first * self._frame.context - self.base
        for name, new in taken.postings.items():
            self._buffers[name].add(new.latents, new.rows + start, new.values)
        self.contexts += len(taken)
        if sum(buffer.bytes for buffer in self._buffers.values()) >= self._spare:
            self._write()

    def end_shard(self, base: int, runs: Path) -> None:
        """Write what is left of a shard; what comes now counts from position `base` and goes to `runs`."""
        self._write()
        self.base, self.runs, self._written = base, runs, 0

    def _write(self) -> None:
        for name, buffer in self._buffers.items():
            if not buffer.empty:
                buffer.write(self.runs / self._frame.folders[name] / f"run-{self._written:05d}")
        self._written += 1

    def close(self) -> None:
        """Close the files; a full disk may show only now."""
        with disk_errors(self._folder):
            self._stack.close()


def counted(frame: Frame, roles: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Unmasked positions of each role; `mask` as it is stored, packed."""
    unmasked = np.bitwise_count(mask).sum(axis=1, dtype=np.int64)
    return np.bincount(roles, unmasked, len(frame.roles)).astype(np.int64)
