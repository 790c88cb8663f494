"""The mesh of ranks and what they say to each other. Every collective of the training goes through here."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from unmix.core.errors import ConfigError, MachineError
from unmix.train.parallel.config import ParallelConfig

Axis = Literal["data", "dictionary", "all"]


class LostRankError(MachineError):
    """Another process of the training died, or was not heard of for the whole timeout."""


@dataclass(frozen=True)
class Team:
    """The processes that `torchrun` started, before they talk: their number, and a board to write on."""

    store: c10d.Store
    rank: int
    size: int

    @staticmethod
    def found() -> Team | None:
        """The team that the environment speaks of (`RANK`, `WORLD_SIZE`, …); None for a process on its own."""
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        store, rank, size = next(iter(rendezvous("env://")))
        return Team(store, rank, size)

    def say(self, word: str) -> None:
        """Write a word on the board."""
        self.store.set(f"unmix/{word}", "1")

    def hear(self, *words: str, every: float = 0.2) -> str:
        """Wait, without end, until one of the words is on the board. `LostRankError` where the board is gone."""
        while True:
            for word in words:
                try:
                    if self.store.check([f"unmix/{word}"]):
                        return word
                except RuntimeError as error:
                    raise LostRankError(f"rank {self.rank}: rank 0 is gone ({_first_line(error)})") from error
            time.sleep(every)


class Mesh:
    """`data × dictionary` ranks; a rank's neighbours in the dictionary have neighbouring numbers (one machine).

    With several teams of coders, `part` is this one's number, and ranks count from 0 in each.
    """

    def __init__(self, team: Team, config: ParallelConfig) -> None:
        """Joins the process group: every rank must. `ConfigError` where the mesh has another size than the team."""
        self.team, self.coders, self.dictionary = team, config.coders, config.dictionary
        self.data = config.data or max(1, team.size // config.coders // config.dictionary)
        self.size = self.data * self.dictionary
        if self.coders * self.size != team.size:
            teams = f"{self.coders} times " if self.coders > 1 else ""
            raise ConfigError(
                f"parallel: {teams}{self} needs {self.coders * self.size} processes, torchrun started {team.size}"
            )
        self.part, self.rank = divmod(team.rank, self.size)
        self._start = team.rank - self.rank
        self.data_index, self.dictionary_index = divmod(self.rank, self.dictionary)
        self.timeout = timedelta(seconds=config.timeout)
        self.device = _device()
        store = c10d.PrefixStore("unmix/mesh", team.store)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        with self._heard("meeting"):
            dist.init_process_group(backend, store=store, rank=team.rank, world_size=team.size, timeout=self.timeout)
            starts = range(0, team.size, self.size)
            columns = [range(s + f, s + self.size, self.dictionary) for s in starts for f in range(self.dictionary)]
            rows = [range(s, s + self.dictionary) for s in range(0, team.size, self.dictionary)]
            teams = [range(s, s + self.size) for s in starts]
            self._groups: dict[Axis, Any] = {
                "data": self._group(columns),
                "dictionary": self._group(rows),
                "all": self._group(teams),
            }
            self._control = self._group(teams, "gloo")

    def __str__(self) -> str:
        return f"a mesh of data {self.data} × dictionary {self.dictionary}"

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what its team trains."""
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def length(self, axis: Axis) -> int:
        """Ranks along an axis."""
        return {"data": self.data, "dictionary": self.dictionary, "all": self.size}[axis]

    def sum_(self, tensor: Tensor, axis: Axis) -> Tensor:
        """Add up over an axis, in place; the same bits on every rank of it."""
        return self._reduce(tensor, axis, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor, axis: Axis) -> Tensor:
        """The largest over an axis, in place."""
        return self._reduce(tensor, axis, dist.ReduceOp.MAX)

    def min_(self, tensor: Tensor, axis: Axis) -> Tensor:
        """The smallest over an axis, in place."""
        return self._reduce(tensor, axis, dist.ReduceOp.MIN)

    def gather(self, tensor: Tensor, axis: Axis) -> list[Tensor]:
        """The tensors of all ranks of an axis, in their order; all must be of one shape."""
        if self.length(axis) == 1:
            return [tensor]
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.length(axis))]
        with self._heard(f"gathering along {axis}"):
            dist.all_gather(found, tensor.contiguous(), group=self._groups[axis])
        return found

    def same_(self, tensor: Tensor) -> Tensor:
        """The tensor of the first rank along the dictionary, in place."""
        if self.dictionary > 1:
            with self._heard("sharing along dictionary"):
                dist.broadcast(
                    tensor, self._start + self.data_index * self.dictionary, group=self._groups["dictionary"]
                )
        return tensor

    def tell(self, word: str) -> str:
        """Rank 0's word, on every rank."""
        box = [word]
        with self._heard("listening to rank 0"):
            dist.broadcast_object_list(box, self._start, group=self._control)
        return box[0]

    def agree(self, problem: str | None) -> None:
        """Wait for every rank; where one has a problem, all raise it as a `MachineError`."""
        with self._heard("waiting for each other"):
            dist.monitored_barrier(self._control, self.timeout, wait_all_ranks=True)
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, problem, group=self._control)
        wrong = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        if wrong:
            raise MachineError("; ".join(wrong[:3]))

    def send(self, tensor: Tensor) -> None:
        """Hand a tensor to rank 0, by way of the CPU."""
        with self._heard("handing over weights"):
            dist.send(tensor.detach().cpu().contiguous(), self._start, group=self._control)

    def receive(self, like: Tensor, rank: int) -> Tensor:
        """What `rank` sends, on the CPU; its shape is that of `like`."""
        found = torch.empty(like.shape, dtype=like.dtype)
        with self._heard("taking over weights"):
            dist.recv(found, self._start + rank, group=self._control)
        return found

    def _reduce(self, tensor: Tensor, axis: Axis, how: Any) -> Tensor:
        if self.length(axis) > 1:
            with self._heard(f"adding up along {axis}"):
                dist.all_reduce(tensor, how, group=self._groups[axis])
        return tensor

    def _group(self, parts: list[range], backend: str | None = None) -> Any:
        """This rank's group; each rank takes part in making all of them, in one order."""
        made = [(ranks, dist.new_group(list(ranks), timeout=self.timeout, backend=backend)) for ranks in parts]
        return next(group for ranks, group in made if self._start + self.rank in ranks)

    @contextmanager
    def _heard(self, doing: str) -> Generator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise LostRankError(
                f"rank {self.rank} of {self.size}: another process is gone or silent, noticed while {doing} "
                f"({_first_line(error)}); this one stops too. The same command goes on from the last checkpoint"
            ) from error


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
