"""Hundreds of small indexes are written here; waiting for the disk at each file would take most of the time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Nothing here pulls the plug: what `fsync` adds (surviving a power cut) no test can see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield
