"""One planted index for the whole room."""

from __future__ import annotations

import pytest

from explain.planted import planted_index
from unmix.explain.windows import View, open_view
from unmix.index.reader import LatentIndex


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> LatentIndex:
    return planted_index(tmp_path_factory.mktemp("planted") / "index")


@pytest.fixture(scope="session")
def explaining(index: LatentIndex) -> View:
    return open_view(index, "explaining")


@pytest.fixture(scope="session")
def scoring(index: LatentIndex) -> View:
    return open_view(index, "scoring")
