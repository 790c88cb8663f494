"""For folders of tiny tensors: one thread (a second costs more than it brings), torch's warnings every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def torch_settings() -> Iterator[None]:
    """In force for every module of a folder whose conftest imports it."""
    threads, always = torch.get_num_threads(), torch.is_warn_always_enabled()
    torch.set_num_threads(1)
    torch.set_warn_always(True)
    yield
    torch.set_num_threads(threads)
    torch.set_warn_always(always)
