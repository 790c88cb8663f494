"""Walking the runs of a sweep, and what is said about them at the end: sweep.json, a table and a plot."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from unmix.core.atomic import write_json, write_text
from unmix.core.errors import NonFiniteError
from unmix.core.plot import Panel, Series, draw
from unmix.run.config import RunConfig
from unmix.run.context import RunContext
from unmix.run.stages import STAGES
from unmix.run.sweep import Part, SweepSpec
from unmix.run.training import metrics_file
from unmix.run.walk import walk
from unmix.train.curves import read_metrics

log = logging.getLogger("unmix")
SCHEMA = 1
SEED = "train.seed"
LAST = 5
"""Records at the end of the metrics whose mean is a member's figure."""


def walk_sweep(spec: SweepSpec, parts: Sequence[Part], out: Path, until: str, redo: Sequence[str] = ()) -> Path:
    """Walk every run up to `until`, write `sweep.json` and `pareto.svg` in `out`, and print the table.

    What was done before is skipped, so that the same command goes on after a stop. Members whose numbers were none
    are told with the reason; `NonFiniteError` where no member is left.
    """
    rows: list[dict[str, Any]] = []
    last: NonFiniteError | None = None
    for part in parts:
        try:
            context, _ = walk(part.config, STAGES, until, redo)
        except NonFiniteError as error:
            last = error
            log.warning("%s: %s", part.config.out, error)
            rows += [lost_row(part.config, name, setting, str(error)) for name, setting in part.members.items()]
        else:
            rows += [member_row(context, name, setting, out) for name, setting in part.members.items()]
        _write(spec, rows, out)
    if last is not None and all(row["lost"] for row in rows):
        raise last
    _print(rows, out)
    return out / "sweep.json"


def lost_row(config: RunConfig, name: str, setting: dict[str, Any], reason: str) -> dict[str, Any]:
    """What a member was to be, and why there is no coder of it."""
    return {
        "member": name,
        "settings": setting,
        "activation": config.members()[name].spec.activation,
        "coder": None,
        "training": {},
        "evaluation": {},
        "lost": reason.removeprefix(f"{name}: "),
    }


def member_row(context: RunContext, name: str, setting: dict[str, Any], out: Path) -> dict[str, Any]:
    """What a member sets, where it lies, and its figures: at the end of training, and of the evaluation."""
    left = context.retired.get(name)
    if left is not None:
        return lost_row(context.config, name, setting, left["reason"])
    records = [r for r in read_metrics(metrics_file(context, name)) if "fvu" in r][-LAST:]
    figures: dict[str, float] = {
        key: sum(r[key] for r in records) / len(records) for key in ("fvu", "l0", "loss", "dead") if records
    }
    evaluated: dict[str, float | None] = {}
    if context.evaluation_file.is_file():
        metrics = context.evaluations()[name]["metrics"]
        evaluated = {key: entry["value"] for key, entry in metrics.items()}
        if evaluated.get("ce_spliced") is not None and evaluated.get("ce_orig") is not None:
            evaluated["ce_increase"] = float(evaluated["ce_spliced"] or 0) - float(evaluated["ce_orig"] or 0)
    spec = context.members[name].spec
    return {
        "member": name,
        "settings": setting,
        "activation": spec.activation,
        "coder": str(context.coder_folder(name).relative_to(out)),
        "training": figures,
        "evaluation": evaluated,
        "lost": None,
    }


def _write(spec: SweepSpec, rows: Sequence[dict[str, Any]], out: Path) -> None:
    write_json(out / "sweep.json", {"schema": SCHEMA, "members": list(rows)})
    write_text(out / "pareto.svg", pareto(rows, spec.colour))


def pareto(rows: Sequence[dict[str, Any]], colour: str) -> str:
    """L0 against FVU, and against the increase in CE where it was measured, as SVG."""
    panels = [Panel("reconstruction", "L0", "FVU", _points(rows, "fvu", colour), log_x=True)]
    if any(row["evaluation"].get("ce_increase") is not None for row in rows):
        panels.append(
            Panel("spliced into the model", "L0", "CE increase, nats", _points(rows, "ce_increase", colour), log_x=True)
        )
    names = {0: "disc", 1: "ring", 2: "cross"}
    seeds = _seeds(rows)
    note = ", ".join(f"{names[i]}: {SEED} {seed}" for i, seed in enumerate(seeds[:3])) if len(seeds) > 1 else ""
    return draw(panels, "sweep: sparsity against faithfulness", note if len(seeds) <= 3 else "")


def _seeds(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """Seeds of the members, in order; none where they do not vary it."""
    return sorted({row["settings"][SEED] for row in rows if SEED in row["settings"]})


def figure(row: dict[str, Any], key: str) -> float | None:
    """A figure of the evaluation where there is one, else of the training."""
    value = row["evaluation"].get(key)
    return value if value is not None else row["training"].get(key)


def _points(rows: Sequence[dict[str, Any]], key: str, colour: str) -> list[Series]:
    groups: dict[str, list[dict[str, Any]]] = {}
    seeds = _seeds(rows)
    for row in rows:
        name = row["activation"] if colour == "coder.activation" else str(row["settings"].get(colour, ""))
        groups.setdefault(name, []).append(row)
    found: list[Series] = []
    for name, members in groups.items():
        kept = [(figure(row, "l0"), figure(row, key), row) for row in members]
        points = sorted(((x, y, row) for x, y, row in kept if x is not None and y is not None), key=lambda p: p[:2])
        found.append(
            Series(
                name,
                [(x, y) for x, y, _ in points],
                labels=[row["member"] for *_, row in points],
                marks=[seeds.index(row["settings"][SEED]) if SEED in row["settings"] else 0 for *_, row in points],
                through=_means(points),
            )
        )
    return found


def _means(points: Sequence[tuple[float, float, dict[str, Any]]]) -> list[tuple[float, float]]:
    """The mean over seeds of each setting, by L0."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for x, y, row in points:
        setting = {field: value for field, value in row["settings"].items() if field != SEED}
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append((x, y))
    return sorted((fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups.values())


def _print(rows: Sequence[dict[str, Any]], out: Path) -> None:
    buffer = io.StringIO()
    width = min(shutil.get_terminal_size((100, 40)).columns, 140)
    console = Console(file=buffer, width=width, force_terminal=sys.stdout.isatty())
    measured = any(row["evaluation"] for row in rows)
    table = Table(title="sweep", title_justify="left", box=None, pad_edge=False)
    columns = (
        ["L0", "FVU", "dead at the end"] if not measured else ["L0", "FVU", "CE increase", "CE recovered", "alive"]
    )
    table.add_column("member")
    for column in columns:
        table.add_column(column, justify="right")
    lost = [row for row in rows if row["lost"]]
    for row in sorted(
        (row for row in rows if not row["lost"]), key=lambda r: (r["activation"], figure(r, "l0") or 0.0)
    ):
        keys = ["ce_increase", "ce_recovered", "alive_fraction"] if measured else ["dead"]
        values = [figure(row, key) for key in ("l0", "fvu", *keys)]
        table.add_row(row["member"], *("" if v is None else f"{v:.4g}" for v in values))
    console.print(table)
    for row in lost:
        console.print(f"lost     {row['member']}: {row['lost']}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"figures  {out / 'sweep.json'}")
    console.print(f"plot     {out / 'pareto.svg'}")
    sys.stdout.write(buffer.getvalue())
