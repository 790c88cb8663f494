"""Figures of finished runs side by side, as a Markdown table: `python -m benchmarks.run_table runs/demo runs/wiki`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from unmix.data.shards import TokenShards
from unmix.explain.ledger import Ledger
from unmix.explain.table import summary
from unmix.index.reader import open_index
from unmix.run.config import load_run
from unmix.run.names import STAGE_NAMES

ROWS = (
    ("FVU", "fvu", "{:.3f}"),
    ("L0", "l0", "{:.1f}"),
    ("CE, model as it is", "ce_orig", "{:.3f}"),
    ("CE, reconstruction spliced in", "ce_spliced", "{:.3f}"),
    ("CE increase", "ce_increase", "{:.3f}"),
    ("CE, zeros spliced in", "ce_ablated_zero", "{:.2f}"),
    ("CE recovered", "ce_recovered", "{:.3f}"),
    ("KL(original ‖ spliced)", "kl_spliced", "{:.3f}"),
    ("latents that fired", "alive_fraction", "{:.3f}"),
    ("latents firing on over 10 % of tokens", "dense_fraction_10", "{:.4f}"),
)


def column(folder: Path) -> dict[str, str]:
    """Every row of one run."""
    config = load_run(str(folder))
    shards = TokenShards.open(folder / "tokens")
    measured = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    report = shards.source_report
    trained = len(shards.contexts_of("train")) * shards.context
    cells = {
        "text": f"`{Path(config.data.source).name}`",
        "SHA-256 of the text": f"`{str(report['sha256'])[:12]}…`",
        "tokens trained on × epochs": f"{trained:,} × {config.train.epochs:g}",
    }
    for label, key, form in ROWS:
        cells[label] = figure(measured["metrics"][key], form)
    index = open_index(folder / "index")
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        for row in summary(ledger, index)["rows"]:
            if row["figure"] in ("f1", "pearson"):
                name = {"f1": "F1", "pearson": "Pearson"}[row["figure"]]
                covered = f"{row['done']} of {row['asked']}"
                cells[f"{row['explainer']}, {row['scorer']} {name}"] = (
                    f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}], {covered}"
                )
    # A stage whose result was removed at the end (the activation cache) has left no stamp: the log says its time.
    found = {name: stamp(folder, name) for name in STAGE_NAMES}
    cells["seconds: " + ", ".join(STAGE_NAMES)] = ", ".join(
        "–" if s is None else f"{s['seconds']:.0f}" for s in found.values()
    )
    return cells


def figure(entry: dict[str, Any], form: str) -> str:
    """Value and 95 % interval."""
    if entry["low"] is None or entry["low"] == entry["high"]:
        return form.format(entry["value"])
    return f"{form.format(entry['value'])} [{form.format(entry['low'])}, {form.format(entry['high'])}]"


def stamp(folder: Path, stage: str) -> dict[str, Any] | None:
    """What the walker wrote of a finished stage; None where it took that back."""
    path = folder / ".stages" / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(places: list[str]) -> None:
    """Print the table."""
    columns = [column(Path(place)) for place in places]
    print("| | " + " | ".join(Path(place).name for place in places) + " |")
    print("| --- |" + " --- |" * len(places))
    for label in columns[0]:
        print(f"| {label} | " + " | ".join(cells.get(label, "") for cells in columns) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
