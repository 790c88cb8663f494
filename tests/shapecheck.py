"""The run-time checker that the test-suite puts on every function of `unmix`: beartype, fitted to our hints."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

# An int is a float wherever a type checker reads the hint (PEP 484), so it is one here.
_CONF = BeartypeConf(is_pep484_tower=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and result checked at every call.

    `isinstance` refuses a Protocol that is not marked as `runtime_checkable`; only tests ask that question, so only
    tests mark them.
    """
    for value in list(vars(sys.modules[function.__module__]).values()):
        if getattr(value, "_is_protocol", False) and str(getattr(value, "__module__", "")).startswith("unmix."):
            typing.runtime_checkable(value)
    try:
        return beartype(function, conf=_CONF)
    except BeartypeDecorHintPep673Exception:
        # beartype reads `Self` only on whole classes, and decorating classes would break pydantic's; these few
        # (validators, `__enter__`) go unchecked.
        return function
