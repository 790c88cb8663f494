"""Rows of token ids that were made elsewhere: checked against the vocabulary, and cut as the input policy says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from unmix.core.errors import DataError
from unmix.core.policy import InputPolicy
from unmix.data.sources.base import Document


@dataclass(frozen=True)
class CutRow:
    """A stored row as whole contexts."""

    contexts: Int64[np.ndarray, "n payload"]
    """Without the BOS that the policy puts before each."""
    starts: Int64[np.ndarray, " documents"]
    """Where a document begins, in ids from the first: at the row's beginning and behind each separator."""
    left_over: int
    """Ids at the row's end that fill no context."""


def checked_ids(document: Document, size: int | None) -> Int64[np.ndarray, " ids"]:
    """The ids of a row; `DataError` naming it where one is not in a vocabulary of `size` (`None`: not known)."""
    ids = np.asarray(document.ids or (), dtype=np.int64)
    wrong = ids[(ids < 0) | (ids >= (np.iinfo(np.int32).max if size is None else size))]
    if len(wrong):
        allowed = "0 or more" if size is None else f"0 to {size - 1}"
        raise DataError(
            f"{document.source}: the id {wrong[0]} is not in the model's vocabulary ({allowed}); "
            "was this data set made with another model's tokenizer?"
        )
    return ids


def as_document(ids: Int64[np.ndarray, " ids"], policy: InputPolicy) -> list[int]:
    """One document's ids without a BOS before and a separator behind: packing puts them where the policy says."""
    if len(ids) and ids[0] == policy.bos_id:
        ids = ids[1:]
    if len(ids) and ids[-1] == policy.separator_id:
        ids = ids[:-1]
    return ids.tolist()


def cut_row(ids: Int64[np.ndarray, " ids"], policy: InputPolicy, context: int) -> CutRow:
    """A row of packed text as contexts of `context` ids, its beginning in the first.

    With `bos="context"` each context is a BOS and `context − 1` ids, and a BOS at the row's beginning is that of its
    first. Otherwise ids stay as they are stored.
    """
    lead = 1 if policy.bos == "context" else 0
    if lead and len(ids) and ids[0] == policy.bos_id:
        ids = ids[1:]
    payload = context - lead
    whole = len(ids) // payload * payload
    kept = ids[:whole]
    return CutRow(kept.reshape(-1, payload), _starts(kept, policy), len(ids) - whole)


def _starts(ids: Int64[np.ndarray, " ids"], policy: InputPolicy) -> Int64[np.ndarray, " documents"]:
    """Where documents begin. Where BOS and separator are one token, the second of two in a row is the BOS."""
    starts = [0] if len(ids) else []
    behind_separator = False
    for place in np.flatnonzero(ids == policy.separator_id).tolist():
        is_bos = place == 0 or (behind_separator and starts[-1] == place and policy.bos_id == policy.separator_id)
        behind_separator = not is_bos
        if behind_separator and place + 1 < len(ids):
            starts.append(place + 1)
    return np.array(starts, dtype=np.int64)
