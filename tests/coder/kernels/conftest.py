"""Kernels run on a card, or under Triton's interpreter, which has to be asked for before Triton is first imported."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

INSTALLED = importlib.util.find_spec("triton") is not None
if INSTALLED and "triton" not in sys.modules:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run here; skips where they do not."""
    if not INSTALLED:
        pytest.skip("Triton is not installed")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("no card, and Triton's interpreter is wrong about loops and unsigned numbers before 3.9")
    if not triton.knobs.runtime.interpret:
        pytest.skip("no card, and Triton was imported before its interpreter could be asked for")
    return "cpu"
