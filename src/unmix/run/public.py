"""`unmix.train`, `unmix.run` and `unmix.view`: the run room from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmix.core.errors import ConfigError
from unmix.run.config import RunConfig, TrainConfig, load_run, refuse_several
from unmix.run.context import RunContext
from unmix.run.publishing import publish
from unmix.run.stages import STAGES
from unmix.run.walk import walk


def train(config: TrainConfig | str | Path) -> RunContext:
    """Train a coder, or several; resumes by itself.

    `config` is a `TrainConfig` (or `RunConfig`) or the path of a run file.

    The result gives `.coder` (`.coders` by name), `.lm`, `.shards` and the folders of the run. Raises what
    `unmix train` would print.
    """
    context = walk(_run_config(config), STAGES, until="train")[0]
    publish(context)
    return context


def run(config: RunConfig | str | Path) -> RunContext:
    """Walk every stage of a run; resumes by itself. `ConfigError` for several coders: explanations are one coder's."""
    found = _run_config(config)
    refuse_several(found, None)
    context = walk(found, STAGES)[0]
    publish(context)
    return context


def view(folder: str | Path, **options: Any) -> None:
    """Serve the viewer of a run on 127.0.0.1 until interrupted; options: `port`, `open_browser`."""
    from unmix.run.serving import serve_run

    serve_run(Path(folder), **options)


def _run_config(config: TrainConfig | str | Path) -> RunConfig:
    if isinstance(config, RunConfig):
        found = config
    elif isinstance(config, TrainConfig):
        found = RunConfig(**{name: getattr(config, name) for name in TrainConfig.model_fields})
    else:
        found = load_run(str(config))
    if found.out is None:
        raise ConfigError("out: a run needs a folder; set TrainConfig(out=...)")
    return found
