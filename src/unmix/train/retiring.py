"""A coder of several whose numbers are none leaves the training, and the others go on: a sweep's members do."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmix.core.atomic import write_json
from unmix.train.config import OptimConfig
from unmix.train.guard import FaultError

NOTE = "retired.json"
"""Beside the metrics of a coder that left. What is trained by a checkpoint is what the checkpoint holds: a coder that
is not in it left before, and one that left after it fails once more at the same step."""


def may_leave(failed: Collection[str], configs: Mapping[str, OptimConfig]) -> bool:
    """Whether those that `failed`, of all that are still trained, can go: not all, and nothing hangs on them."""
    return len(failed) < len(configs) and all(
        configs[name].retire and configs[name].splice == "alone" for name in failed
    )


def note_retired(folder: Path, fault: FaultError, places: Sequence[Mapping[str, int]]) -> None:
    """Write why the coder whose metrics lie in `folder` left."""
    write_json(folder / NOTE, {"reason": str(fault), **fault.record(), "places": list(places)})


def retired(folder: Path) -> dict[str, Any] | None:
    """Why the coder whose metrics lie in `folder` left, or None where it did not."""
    path = folder / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def back_again(folder: Path) -> None:
    """The coder is (still, or once more) being trained."""
    (folder / NOTE).unlink(missing_ok=True)
