"""Metrics as JSON lines that a resumed run rewrites identically; timings live in a file of their own (decision 15)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmix.core.atomic import disk_errors, write_text


class MetricsLog:
    """Appends one line a record; on resume forgets what lies after the checkpoint's step."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep the records of `path` with `step` at most the given one."""
        self.path = path
        kept: list[str] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line being written when the process died
                if record["step"] > step:
                    break
                kept.append(line)
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must hold `step`."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, allow_nan=False) + "\n")
