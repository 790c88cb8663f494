"""The ledger's rows as plain data."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExplanationKey:
    """What makes an explanation the same as another (decision 21)."""

    coder: str
    coder_hash: str
    index_hash: str
    latent: int
    method: str
    """`ngram`, `tokens`, `llm`, `random:ngram`, …"""
    config_hash: str
    sample: int = 0


@dataclass(frozen=True)
class ScoreKey:
    """What makes a score the same as another."""

    explanation_id: int
    index_hash: str
    """The index whose `score` contexts it was counted on."""
    method: str
    config_hash: str
    sample: int = 0


@dataclass(frozen=True)
class Explanation:
    """One row. `text` is None unless `status` is done; `error` is None unless it is failed."""

    id: int
    coder: str
    coder_hash: str
    index_hash: str
    latent: int
    method: str
    config_hash: str
    sample: int
    config: dict[str, Any]
    status: str
    attempts: int
    error: str | None
    message: str | None
    text: str | None
    data: dict[str, Any]
    raw: list[str]
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Score:
    """One row. `figures` is empty unless `status` is done."""

    id: int
    explanation_id: int
    index_hash: str
    method: str
    config_hash: str
    sample: int
    config: dict[str, Any]
    status: str
    attempts: int
    error: str | None
    message: str | None
    figures: dict[str, float | None]
    counted: dict[str, Any]
    raw: list[str]
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


_JSON = {"config": {}, "data": {}, "figures": {}, "counted": {}, "raw": []}


def _plain(row: sqlite3.Row) -> dict[str, Any]:
    fields = {name: row[name] for name in row.keys() if name not in ("owner", "updated")}  # noqa: SIM118
    for name, empty in _JSON.items():
        if name in fields:
            fields[name] = json.loads(fields[name]) if fields[name] is not None else empty.copy()
    return fields


def explanation_row(row: sqlite3.Row) -> Explanation:
    """A row of `explanations`."""
    return Explanation(**_plain(row))


def score_row(row: sqlite3.Row) -> Score:
    """A row of `scores`."""
    return Score(**_plain(row))
