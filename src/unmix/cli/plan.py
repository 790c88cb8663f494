"""`unmix plan`: what a training will need, from its run file alone."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unmix.core.config import parse_overrides
from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from unmix.train.plan import Plan

USAGE = """usage: unmix plan CONFIG [--gpus N] [--gpu NAME] [--section.field VALUE …] [--json]

Memory of each card, messages and time of a step, disk, a bound of tokens a second, hours and cost of the training in
CONFIG. Reckoned from sizes and from what makers state; nothing is loaded and nothing is run.

  --gpus N          cards (default: plan.gpus, 1); without parallel.dictionary the smallest mesh that fits is taken
  --gpu NAME        a100, h100, h200 or b200
  --dictionary N    short for --parallel.dictionary
  --width N         width of the hooks, where the model is not at hand
  --l0 N            latents a token, for kinds without k
  --price DOLLARS   of a card-hour
  --json            numbers for programs, in bytes and seconds
"""
SHORT = {name: f"plan.{name}" for name in ("gpus", "gpu", "width", "l0", "price")} | {
    "dictionary": "parallel.dictionary"
}
WIDTH = 100


def command(arguments: list[str]) -> int:
    """Print the plan of a run file."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if arguments[0].startswith("-"):
        raise ConfigError(f"the first argument is a run file, a run folder or builtin:NAME, found {arguments[0]!r}")
    from unmix.run.config import load_run
    from unmix.run.planning import plan_run

    words = [word for word in arguments[1:] if word != "--json"]
    overrides = {SHORT.get(key, key): value for key, value in parse_overrides(words).items()}
    plan = plan_run(load_run(arguments[0], overrides))
    if len(words) < len(arguments) - 1:
        sys.stdout.write(json.dumps(record(plan), indent=2) + "\n")
    else:
        sys.stdout.write(shown(plan))
    return 0


def record(plan: Plan) -> dict[str, Any]:
    """JSON-able, in bytes, seconds and operations."""
    layout = plan.layout
    return {
        "mesh": {"data": layout.data, "dictionary": layout.dictionary, "gpu": plan.config.gpu},
        "memory": {**plan.memory, "used": plan.used, "card": layout.device.memory, "fits": plan.fits},
        "messages": [asdict(message) for message in plan.messages],
        "phases": [asdict(phase) for phase in plan.phases],
        "step_seconds": plan.seconds,
        "tokens_per_second_bound": plan.bound,
        "steps": plan.steps,
        "efficiency": plan.config.efficiency,
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.ranks,
        "cost": plan.cost,
        "capture_hours": plan.capture_hours,
        "disk": {"cache": plan.cache, "checkpoint": plan.checkpoint, "coders": plan.coder},
    }


def shown(plan: Plan) -> str:
    """Tables of at most 100 columns."""
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=WIDTH, force_terminal=False, color_system=None, highlight=False)
    for title, table in (_memory(plan), _step(plan), _messages(plan), _whole(plan)):
        console.print(title)
        console.print(table)
        console.print()
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip() + "\n"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _memory(plan: Plan) -> tuple[str, Table]:
    layout, card = plan.layout, plan.layout.device.memory
    title = f"memory of a rank, mesh of data {layout.data} × dictionary {layout.dictionary}, {plan.config.gpu}"
    table = _table("", "bytes", "of the card")
    for what, size in plan.memory.items():
        if size:
            table.add_row(what, sized(size), f"{100 * size / card:.1f} %")
    table.add_row("all", sized(plan.used), f"{100 * plan.used / card:.1f} %")
    table.add_row("card", sized(card), "fits" if plan.fits else "does not fit")
    return title, table


def _step(plan: Plan) -> tuple[str, Table]:
    layout = plan.layout
    title = f"a step of {layout.batch:,} tokens, {layout.tokens:,.0f} a rank, product in {plan.config.precision}"
    table = _table("", "operations", "moved", "ms at peak")
    for phase in plan.phases:
        operations = f"{phase.flops / 1e9:,.1f} G" if phase.flops else ""
        moved = sized(phase.moved) if phase.moved else ""
        table.add_row(phase.what, operations, moved, f"{1000 * phase.seconds:,.2f}")
    table.add_row("all", "", "", f"{1000 * plan.seconds:,.2f}")
    return title, table


def _messages(plan: Plan) -> tuple[str, Table]:
    table = _table("", "along", "number", "sent", "at")
    for message in plan.messages:
        table.add_row(
            message.what, message.axis, str(message.count), sized(message.sent),
            f"{sized(plan.layout.speed(message.axis))}/s",
        )  # fmt: skip
    if not plan.messages:
        table.add_row("none: one process", "", "", "", "")
    return "messages of a rank in a step", table


def _whole(plan: Plan) -> tuple[str, Table]:
    table = _table("", "")
    share = f"{100 * plan.config.efficiency:.0f} % of the peaks"
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("tokens a second, at most", f"{plan.bound:,.0f}")
    table.add_row(f"tokens a second at {share}", f"{plan.bound * plan.config.efficiency:,.0f}")
    table.add_row(f"hours at {share}", f"{plan.hours:,.1f}")
    table.add_row("card-hours", f"{plan.hours * plan.ranks:,.1f}")
    if plan.cost is not None:
        table.add_row(f"cost at {plan.config.price:g} $ a card-hour", f"{plan.cost:,.0f} $")
    if plan.capture_hours is not None:
        table.add_row(f"hours of capture on one card at {share}", f"{plan.capture_hours:,.1f}")
    table.add_row("activation cache on disk", sized(plan.cache) if plan.cache else "none")
    table.add_row("one checkpoint on disk", sized(plan.checkpoint))
    table.add_row("finished coders", sized(plan.coder))
    return "the whole training", table


def sized(count: float) -> str:
    """`1.23 GB`, by powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    raise AssertionError
