"""One tree of errors, each with the exit code that the command line ends with."""

from __future__ import annotations

import pytest

from unmix.core import errors
from unmix.core.errors import UnmixError, did_you_mean, missing_extra, nearest

CODES = {
    "UnmixError": 2, "ConfigError": 2, "FormatError": 2, "ModelError": 2, "DataError": 2, "ResumeError": 2,
    "MachineError": 3, "ServiceError": 3, "CorruptError": 4, "NonFiniteError": 4,
}  # fmt: skip


def test_exit_codes() -> None:
    """2 the user's input, 3 the machine, 4 corrupt or non-finite data; no error without a line here."""
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, UnmixError)
    }
    assert found == CODES


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("topkk", "Did you mean 'topk' or 'batchtopk'?"),
        ("zzz", "Allowed: topk, batchtopk, relu."),
    ],
)
def test_near_words_are_offered(word: str, sentence: str) -> None:
    """All of them where none is near."""
    assert did_you_mean(word, ["topk", "batchtopk", "relu"]) == sentence


def test_nearest_gives_the_best_first() -> None:
    """And no more than asked for."""
    assert nearest("layers.1", ["layers.10", "layers.1.mlp", "embed", "layers.11"], n=2)[0] in (
        "layers.10",
        "layers.11",
    )
    assert nearest("layers.1", ["embed"]) == []


def test_a_missing_extra_says_how_to_get_it() -> None:
    """The machine's fault, exit code 3."""
    error = missing_extra("pyarrow", "parquet", "reading .parquet")
    assert str(error) == "reading .parquet needs the package 'pyarrow': pip install 'unmix[parquet]'"
    assert error.exit_code == 3
