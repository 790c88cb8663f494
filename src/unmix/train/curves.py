"""Training curves as one SVG beside a coder's metrics, drawn without any library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmix.core.atomic import write_text
from unmix.core.plot import Panel, Series, draw

CURVES = "curves.svg"
FIGURES = (("loss", "loss"), ("fvu", "FVU"), ("l0", "L0"), ("dead", "dead latents"))
HELD_OUT = "held_out/"
"""Begins the names of figures on rows that are not trained on."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; empty where there is none."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_curves(folder: Path, names: Sequence[str]) -> None:
    """`folder/NAME/curves.svg` of every coder: loss, FVU, L0 and dead latents by step."""
    for name in names:
        records = read_metrics(folder / name / "metrics.jsonl")
        panels = [
            Panel(title, "step", "", [Series("", [(r["step"], r[key]) for r in records if key in r], line=True)])
            for key, title in FIGURES
        ]
        write_text(folder / name / CURVES, draw(panels, f"training of {name}"))
