"""Tensors here are tiny: a second thread costs more than it brings, and ten times more on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1); torch.set_warn_always(True)
    yield
    torch.set_num_threads(before)
