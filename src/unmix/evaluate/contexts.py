"""The tokens that an evaluation reads."""

from __future__ import annotations

import logging
import math

import numpy as np

from unmix.core.errors import DataError
from unmix.data.config import Role
from unmix.lm.contexts import Batch, Contexts, TokenTensor, as_contexts, read_batch

__all__ = ["Batch", "Contexts", "TokenTensor", "as_contexts", "choose", "read_batch"]

log = logging.getLogger("unmix")


def choose(data: Contexts, role: Role, tokens: int | None) -> np.ndarray:
    """Ids of the first contexts of `role` that hold `tokens` tokens (all of them by default).

    `DataError` where the role has none; fewer than asked for is said in the log and in the result.
    """
    ids = np.asarray(data.contexts_of(role))
    if len(ids) == 0:
        raise DataError(f"no contexts of role {role!r} to evaluate on")
    if tokens is None:
        return ids
    if tokens < 1:
        raise DataError(f"tokens must be at least 1, found {tokens}")
    wanted = math.ceil(tokens / data.context)
    if wanted > len(ids):
        log.info("evaluate: %d tokens asked for, role %r holds %d", tokens, role, len(ids) * data.context)
    return ids[:wanted]
