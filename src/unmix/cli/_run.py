"""What the commands that walk a run share: arguments, the walk, the summary."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import yaml

from unmix.core.config import parse_overrides
from unmix.core.errors import ConfigError

if TYPE_CHECKING:
    from unmix.run.config import RunConfig

USAGE = """usage: unmix {name} CONFIG [--out FOLDER] [--section.field VALUE …]

CONFIG is a YAML run file, a run folder, or a built-in one: {builtin}.
{what}
A stopped run goes on where it was: say the same command again.

  --out FOLDER      the run folder (default: runs/ and the name of the config)
  --model NAME      short for --model.name: Hugging Face name or folder, GGUF file, builtin:smollm2
  --data SOURCE     short for --data.source: file, folder, hf:NAME, builtin:python-docs
  --hook HOOK       short for --coder.hook
  --push-to-hub OWNER/NAME  short for --publish.hub: the finished coders go there, with a card
  --redo STAGE      do this stage again (several: commas); stages: {stages}
  --until STAGE     stop after this stage
  --section.field VALUE   any field of the run file, e.g. --coder.k 64 --data.tokens 10M
"""
SWEEP = """  --sweep FILE      vary fields of the run file: a grid or a random draw, on one stream
"""
REPLAY = """  --on-nonfinite skip     leave steps out whose numbers are none, up to --train.skip_limit (default: stop)
  --replay WHICH    look again at the step that was stopped at, number by number: `last`, or a coder's name
"""
SWEPT = ("train", "evaluate", "index")


def run_until(stage: str | None, arguments: list[str]) -> int:
    """Parse, validate, walk up to `stage` (None: all) and print the summary."""
    from unmix.run.config import builtin_runs, load_run, refuse_several

    if not arguments or arguments[0] in ("-h", "--help"):
        from unmix.run.names import STAGE_NAMES

        what = f"Runs every stage up to {stage!r}." if stage else "Runs every stage."
        sys.stdout.write(
            USAGE.format(
                name=stage or "run",
                what=what,
                stages=", ".join(STAGE_NAMES),
                builtin=", ".join(f"builtin:{name}" for name in builtin_runs()),
            )
        )
        sys.stdout.write((SWEEP if stage in SWEPT else "") + (REPLAY if stage == "train" else ""))
        return 0
    if arguments[0].startswith("-"):
        raise ConfigError(f"the first argument is a run file, a run folder or builtin:NAME, found {arguments[0]!r}")
    overrides = parse_overrides(arguments[1:])
    redo = [name for name in overrides.pop("redo", "").split(",") if name]
    until = overrides.pop("until", None) or stage
    if "sweep" in overrides:
        return _sweep(arguments[0], overrides, until, redo)
    if "replay" in overrides:
        which = overrides.pop("replay")
        return _replay(load_run(arguments[0], overrides), which)
    config = load_run(arguments[0], overrides)
    refuse_several(config, until)
    from unmix.run.publishing import publish
    from unmix.run.stages import STAGES
    from unmix.run.summary import print_summary
    from unmix.run.team import follow, follows, leave
    from unmix.run.walk import walk

    if follows():
        return follow(config)
    context, result = walk(config, STAGES, until, redo)
    leave(context)
    print_summary(context, result)
    publish(context)
    return 0


def _sweep(place: str, overrides: dict[str, str], until: str | None, redo: list[str]) -> int:
    if until not in SWEPT:
        raise ConfigError(f"a sweep goes up to one of the stages {', '.join(SWEPT)}: add --until evaluate, say")
    from unmix.run.config import run_with
    from unmix.run.sweep import plan_sweep, read_sweep
    from unmix.run.team import refuse_team

    refuse_team("a sweep")
    spec = read_sweep(overrides.pop("sweep"))
    tree, out = run_with(place, overrides)
    if tree.get("coder_set"):
        raise ConfigError(
            "coder_set: members of a sweep are trained apart; take coder_set out, or train the set itself"
        )
    if tree.get("publish"):
        raise ConfigError(
            "publish: a sweep's coders are not pushed; choose one and say coder.push_to_hub, or unmix train"
        )
    parts = plan_sweep(spec, tree, out, place)
    from unmix.run.sweeping import walk_sweep

    walk_sweep(spec, parts, out, "evaluate" if spec.evaluate and until == "train" else until, redo)
    return 0


def _replay(config: RunConfig, which: str) -> int:
    from unmix.run.team import refuse_team
    from unmix.run.training import replay_run

    refuse_team("--replay")
    for report in replay_run(config, which):
        sys.stdout.write(yaml.safe_dump(report, sort_keys=False, allow_unicode=True))
    return 0
