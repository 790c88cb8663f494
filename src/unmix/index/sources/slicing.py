"""Slicings that token shards bring along: who speaks at a position, and the label of its document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from unmix.core.errors import DataError, did_you_mean
from unmix.core.progress import log
from unmix.data.config import SPEAKERS
from unmix.data.shards import TokenShards

UNLABELLED = "(none)"
MAX_LABELS = 255


@dataclass(frozen=True)
class Labels:
    """Labels of documents as a slicing."""

    values: tuple[str, ...]
    of_document: UInt8[np.ndarray, " documents"]
    """By place in `values`."""


def document_labels(shards: TokenShards) -> Labels | None:
    """The labels, where documents have any and they are at most 255; None otherwise, said where they are more."""
    found = shards.labels()
    distinct = sorted({label for label in found if label is not None})
    if not distinct or (len(distinct) == 1 and None not in found):
        return None
    if len(distinct) > MAX_LABELS:
        if shards.config.label_column is not None:
            log.warning(
                "labels: %d different ones in column %r, more than the %d that an index can be cut by; left out",
                len(distinct), shards.config.label_column, MAX_LABELS,
            )  # fmt: skip
        return None
    values = (*distinct, UNLABELLED) if None in found else tuple(distinct)
    numbers = {label: i for i, label in enumerate(values)}
    of_document = np.array([numbers[UNLABELLED if label is None else label] for label in found], np.uint8)
    return Labels(values, of_document)


@dataclass(frozen=True)
class Slicings:
    """What token shards are cut by, and which of the speakers count."""

    shards: TokenShards
    labels: Labels | None
    counted: tuple[int, ...] | None
    """Speakers whose positions count; None: all."""

    @classmethod
    def of(cls, shards: TokenShards, speakers: tuple[str, ...] | None = None) -> Slicings:
        """Slicings of `shards`; only positions of `speakers` count where some are named.

        `DataError` for a speaker that does not exist, or where nobody speaks.
        """
        for name in speakers or ():
            if name not in SPEAKERS:
                raise DataError(f"--speakers: no speaker {name!r}. {did_you_mean(name, SPEAKERS)}")
        if speakers and not shards.spoken:
            raise DataError(f"--speakers {','.join(speakers)}: {shards.folder} holds no chats; say --chat")
        counted = None if not speakers else tuple(i for i, name in enumerate(SPEAKERS) if name in speakers)
        return cls(shards, document_labels(shards), counted)

    @property
    def values(self) -> dict[str, tuple[str, ...]]:
        """Names of the values of each slicing."""
        speaker: dict[str, tuple[str, ...]] = {"speaker": SPEAKERS} if self.shards.spoken else {}
        return speaker if self.labels is None else {**speaker, "label": self.labels.values}

    def numbers(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """By slicing [n, context]: the value's number of each position of some contexts."""
        found: dict[str, np.ndarray] = {}
        if self.shards.spoken:
            found["speaker"] = self.shards.speakers(ids)
        if self.labels is not None:
            found["label"] = self.labels.of_document[self.shards.documents(ids)]
        return found

    def mask(self, ids: np.ndarray) -> Bool[np.ndarray, "n context"]:
        """Positions that count, by the policy and by who speaks."""
        mask = self.shards.mask(ids)
        return mask if self.counted is None else mask & np.isin(self.shards.speakers(ids), self.counted)
