"""One encoded batch: what sources give and what an index takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from unmix.index.checks import CodesLike


@dataclass(frozen=True)
class IndexBatch:
    """One encoded batch: what `IndexWriter.add` takes."""

    tokens: np.ndarray
    """Token ids [batch, context]."""
    roles: np.ndarray
    """Number of the role of each context [batch]."""
    documents: np.ndarray
    """Document id of each position [batch, context]."""
    mask: np.ndarray
    """Bool [batch, context], True where the position counts."""
    codes: Mapping[str, CodesLike]
    """By coder name; rows are the batch's positions in order."""
    slices: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """By slicing: number of the value that each position belongs to [batch, context]."""
