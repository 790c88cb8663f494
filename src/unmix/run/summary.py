"""The table at the end of a run."""

from __future__ import annotations

import io
import shutil
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from unmix.core.progress import clock
from unmix.run.context import RunContext
from unmix.run.walk import Walk, stamp_of

FIGURES = (
    ("fvu", "fraction of variance unexplained", "{:.3f}"),
    ("l0", "latents firing a token (L0)", "{:.1f}"),
    ("ce_orig", "CE of the model, nats", "{:.3f}"),
    ("ce_spliced", "CE with the reconstruction spliced in", "{:.3f}"),
    ("ce_ablated_zero", "CE with zeros spliced in", "{:.3f}"),
    ("ce_recovered", "CE recovered", "{:.3f}"),
    ("kl_spliced", "KL(original ‖ spliced), nats", "{:.3f}"),
    ("alive_fraction", "latents that fired", "{:.1%}"),
    ("dense_fraction_10", "latents firing on over 10 % of tokens", "{:.2%}"),
)


def print_summary(context: RunContext, walked: Walk) -> None:
    """Stages, evaluation and explanation scores, to stdout."""
    buffer = io.StringIO()
    width = min(shutil.get_terminal_size((100, 40)).columns, 110)
    console = Console(file=buffer, width=width, force_terminal=sys.stdout.isatty())
    console.print(stage_table(walked))
    if context.evaluation_file.is_file():
        found = context.evaluation()
        console.print(coders_table(found["coders"]) if "coders" in found else evaluation_table(found))
    elif "train" in (*walked.seconds, *walked.skipped) and (table := training_table(context)).row_count:
        console.print(table)
    if context.ledger_file.is_file():
        from unmix.run.explaining import SHOWN_FIGURES, summary_rows

        rows = [row for row in summary_rows(context) if row["figure"] in SHOWN_FIGURES]
        if rows:
            console.print(score_table(rows))
    console.print(f"run     {context.folder}")
    page = context.report_folder / "index.html"
    if page.is_file():
        console.print(f"report  {page}")
        console.print(f"look    unmix view {context.folder}")
    sys.stdout.write(buffer.getvalue())


def stage_table(walked: Walk) -> Table:
    """Seconds a stage; of those that were there already, what they once took."""
    table = Table(title="stages", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("time", justify="right")
    for name in walked.skipped:
        stamp = stamp_of(walked.folder, name)
        table.add_row(name, "done before" if stamp is None else f"done before, {clock(stamp['seconds'])}")
    for name, seconds in walked.seconds.items():
        table.add_row(name, clock(seconds))
    return table


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """The figures with their 95 % intervals."""
    table = Table(title="\nevaluation on held-out documents", title_justify="left", box=None, pad_edge=False)
    for name in ("metric", "value", "95 % interval"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for key, words, form in FIGURES:
        entry = evaluation.get("metrics", evaluation).get(key)
        if entry is None:
            continue
        value = entry["value"] if isinstance(entry, dict) else entry
        interval = ""
        if isinstance(entry, dict) and entry.get("low") is not None:
            interval = f"{form.format(entry['low'])} – {form.format(entry['high'])}"
        table.add_row(words, form.format(value), interval)
    return table


def coders_table(evaluations: dict[str, dict[str, Any]]) -> Table:
    """A row a coder: the main figures without their intervals."""
    table = Table(title="\nevaluation on held-out documents", title_justify="left", box=None, pad_edge=False)
    table.add_column("coder")
    shown = ("fvu", "l0", "ce_spliced", "ce_recovered", "kl_spliced", "alive_fraction")
    forms = {key: form for key, _, form in FIGURES}
    for key in shown:
        table.add_column(key, justify="right")
    for name, evaluation in evaluations.items():
        values = [evaluation["metrics"].get(key, {}).get("value") for key in shown]
        table.add_row(name, *("" if v is None else forms[key].format(v) for key, v in zip(shown, values, strict=True)))
    return table


def training_table(context: RunContext) -> Table:
    """The last figures of training, of each coder that has them."""
    from unmix.run.training import metrics_file
    from unmix.train.curves import read_metrics

    table = Table(title="\nthe end of training, on training text", title_justify="left", box=None, pad_edge=False)
    table.add_column("coder")
    for name in ("FVU", "L0", "dead latents"):
        table.add_column(name, justify="right")
    for name in context.members:
        if name in context.retired:
            continue
        records = [record for record in read_metrics(metrics_file(context, name)) if "fvu" in record]
        if records:
            last = records[-1]
            table.add_row(name, f"{last['fvu']:.3f}", f"{last['l0']:.1f}", f"{last['dead']:,.0f}")
    return table


def score_table(rows: list[dict[str, Any]]) -> Table:
    """Mean scores by explainer and scorer, coverage beside them, baselines in the same table."""
    table = Table(title="\nexplanations", title_justify="left", box=None, pad_edge=False)
    for name in ("explainer", "scorer", "figure", "mean", "95 % interval", "median", "scored"):
        table.add_column(name, justify="left" if name in ("explainer", "scorer", "figure") else "right")
    for row in rows:
        table.add_row(
            row["explainer"], row["scorer"], row["figure"], f"{row['mean']:.3f}",
            f"{row['low']:.3f} – {row['high']:.3f}", f"{row['median']:.3f}", f"{row['done']} of {row['asked']}",
        )  # fmt: skip
    return table
