"""One tree of errors. Each carries the exit code that the command line ends with.

0 success, 2 the user's input, 3 the machine (disk, port, missing extra, service),
4 corrupt or non-finite data, 130 interrupted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnmixError(Exception):
    """Base of everything that `unmix` raises on purpose. The message is for the user."""

    exit_code = 2


class ConfigError(UnmixError):
    """A config, flag or argument that cannot be used."""


class FormatError(UnmixError):
    """A coder file or folder that is not what it should be, or that no format recognises."""


class ModelError(UnmixError):
    """A language model or hook that cannot be found, or a coder that does not fit the model."""


class DataError(UnmixError):
    """A text source that is missing, empty, binary or too short."""


class ResumeError(UnmixError):
    """A run folder that was made by another config or version, or that another process holds."""


class MachineError(UnmixError):
    """The machine's fault, not the input's: a full or read-only disk, a port in use, a missing extra."""

    exit_code = 3


class ServiceError(MachineError):
    """A remote service (model hub, LLM endpoint) that does not answer or answers with an error."""


class CorruptError(UnmixError):
    """A file whose length or hash is not what its manifest says."""

    exit_code = 4


class NonFiniteError(UnmixError):
    """NaN or infinity where numbers must be finite. Nothing was saved from it."""

    exit_code = 4


def nearest(word: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """The `n` allowed words most like `word`, best first."""
    return difflib.get_close_matches(word, list(allowed), n=n, cutoff=0.5)


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """A sentence naming the nearest allowed words, or all of them where none is near."""
    options = list(allowed)
    near = nearest(word, options)
    if near:
        return f"Did you mean {' or '.join(repr(w) for w in near)}?"
    return f"Allowed: {', '.join(options)}."


def missing_extra(package: str, extra: str, purpose: str) -> MachineError:
    """The error for an optional dependency that is not installed."""
    return MachineError(f"{purpose} needs the package {package!r}: pip install 'unmix[{extra}]'")
