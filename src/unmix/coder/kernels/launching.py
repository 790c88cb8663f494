"""When kernels can run, and the block sizes that they are launched with (guesses until a card has spoken)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def available() -> bool:
    """Whether Triton is installed. Looked up without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (`TRITON_INTERPRET=1` before its import): for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def usable(*tensors: Tensor) -> bool:
    """Whether kernels can run on all of these: on one CUDA card, or anywhere under the interpreter."""
    if not available() or any(t.dtype not in (torch.float32, torch.float16, torch.bfloat16) for t in tensors):
        return False
    if interpreted():
        return all(t.device.type == "cpu" for t in tensors)
    return all(t.is_cuda and t.device == tensors[0].device for t in tensors)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def on_grid(kernel: Any, *grid: int) -> Callable[..., None]:
    """The kernel, to be called on so many programs (Triton's `kernel[grid]`)."""
    launch: Callable[..., None] = kernel[grid]
    return launch


@dataclass(frozen=True)
class Tiles:
    """Shape of a program of the score kernel."""

    tokens: int
    latents: int
    inner: int
    group: int
    warps: int
    stages: int
    registers: int | None = None
    """At most, a thread; 128 of 256 threads let two programs share a multiprocessor."""

    def options(self) -> dict[str, int]:
        """How the kernel is to be compiled."""
        most = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}


SMALL = Tiles(16, 32, 16, 2, 4, 1)
"""Under the interpreter, where every program costs milliseconds; several programs even in small tests."""
HALF = Tiles(128, 128, 64, 8, 8, 3, 128)
"""float16 and bfloat16: 96 KiB of shared memory, so that one program's selection hides behind another's product."""
WIDE = Tiles(128, 256, 64, 8, 8, 3)
"""The usual shape of a fast product: 144 KiB, one program a multiprocessor. To be tried against `HALF` on a card."""
FULL = Tiles(64, 64, 32, 8, 4, 3)
"""float32, whose exact products do not run on tensor cores."""


def tiles_of(dtype: torch.dtype) -> Tiles:
    """Which of them."""
    if interpreted():
        return SMALL
    return FULL if dtype == torch.float32 else HALF


@dataclass(frozen=True)
class PassShape:
    """How a program of the latent-major pass is made up, for rows of so many numbers."""

    tokens: int
    """Pairs in flight."""
    warps: int


def pass_shape(width: int) -> PassShape:
    """Wide rows take more warps and fewer tokens: at 4096 two tokens need 128 registers a thread, four 150 (sm_90)."""
    if interpreted():
        return PassShape(2, 4)
    return PassShape(2, 8) if width > 2048 else PassShape(4, 4)
