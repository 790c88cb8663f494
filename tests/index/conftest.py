"""Hundreds of small indexes are written here; waiting for the disk at each file would take most of the time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from index.builds import make_source, small_cut, tree
from unmix.index.building import build


@pytest.fixture(scope="module", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Nothing here pulls the plug: what `fsync` adds (surviving a power cut) no test can see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every byte of the index of `make_source()`, built in one go."""
    folder = tmp_path_factory.mktemp("reference") / "i"
    with pytest.MonkeyPatch.context() as patch:
        small_cut(patch)
        build(folder, make_source)
    return tree(folder)
