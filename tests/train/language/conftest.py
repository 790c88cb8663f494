"""Text that every Python brings along."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document a topic of the interpreter's manual."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("topics")
    for name, content in sorted(topics.items())[:40]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(content, encoding="utf-8")
    return folder
