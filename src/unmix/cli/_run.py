"""What the commands that walk a run share: arguments, the walk, the summary."""

from __future__ import annotations

import sys

from unmix.core.config import parse_overrides
from unmix.core.errors import ConfigError

USAGE = """usage: unmix {name} CONFIG [--out FOLDER] [--section.field VALUE …]

CONFIG is a YAML run file, a run folder, or a built-in one: {builtin}.
{what}
A stopped run goes on where it was: say the same command again.

  --out FOLDER      the run folder (default: runs/ and the name of the config)
  --model NAME      short for --model.name: Hugging Face name or folder, GGUF file, builtin:smollm2
  --data SOURCE     short for --data.source: file, folder, hf:NAME, builtin:python-docs
  --hook HOOK       short for --coder.hook
  --redo STAGE      do this stage again (several: commas); stages: {stages}
  --until STAGE     stop after this stage
  --section.field VALUE   any field of the run file, e.g. --coder.k 64 --data.tokens 10M
"""


def run_until(stage: str | None, arguments: list[str]) -> int:
    """Parse, validate, walk up to `stage` (None: all) and print the summary."""
    from unmix.run.config import builtin_runs, load_run

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
        return 0
    if arguments[0].startswith("-"):
        raise ConfigError(f"the first argument is a run file, a run folder or builtin:NAME, found {arguments[0]!r}")
    overrides = parse_overrides(arguments[1:])
    redo = [name for name in overrides.pop("redo", "").split(",") if name]
    until = overrides.pop("until", None) or stage
    config = load_run(arguments[0], overrides)
    from unmix.run.stages import STAGES
    from unmix.run.summary import print_summary
    from unmix.run.walk import walk

    context, result = walk(config, STAGES, until, redo)
    print_summary(context, result)
    return 0
