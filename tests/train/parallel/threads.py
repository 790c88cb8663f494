"""A mesh of threads: what ranks say to each other without processes, for tests of the selection."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from unmix.train.parallel.mesh import Axis, Mesh


class Board:
    """Where threads leave tensors for each other."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size, timeout=20), [torch.empty(0)] * size

    def swap(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """Everybody's tensor, in the order of ranks."""
        self.slots[rank] = tensor.clone()
        self.barrier.wait()
        found = [slot.clone() for slot in self.slots]
        self.barrier.wait()
        return found


class ThreadMesh(Mesh):
    """One rank of a mesh whose ranks are threads."""

    def __init__(self, rank: int, data: int, dictionary: int, board: Board | None = None) -> None:
        self.rank, self.data, self.dictionary, self.size = rank, data, dictionary, data * dictionary
        self.coders, self.part = 1, 0
        self.data_index, self.dictionary_index = divmod(rank, dictionary)
        self.device, self.timeout, self.board = torch.device("cpu"), timedelta(seconds=20), board

    def gather(self, tensor: Tensor, axis: Axis) -> list[Tensor]:
        """Those of the axis."""
        if self.board is None:
            return [tensor]
        found = self.board.swap(self.rank, tensor)
        if axis == "data":
            return found[self.dictionary_index :: self.dictionary]
        start = self.data_index * self.dictionary
        return found[start : start + self.dictionary] if axis == "dictionary" else found

    def _reduce(self, tensor: Tensor, axis: Axis, how: Any) -> Tensor:
        parts = torch.stack(self.gather(tensor, axis))
        name = str(how).rsplit(".", 1)[-1]
        return tensor.copy_(parts.sum(0) if name == "SUM" else parts.amax(0) if name == "MAX" else parts.amin(0))


def together(data: int, dictionary: int, work: Callable[[ThreadMesh], Any]) -> list[Any]:
    """What `work` returns on each rank; an exception of one is raised."""
    size = data * dictionary
    board, found, wrong = Board(size), [None] * size, []

    def live(rank: int) -> None:
        try:
            found[rank] = work(ThreadMesh(rank, data, dictionary, board))
        except BaseException as error:  # handed to the main thread
            wrong.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    return found
