"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from unmix.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("inspect", "x")` gives exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call
