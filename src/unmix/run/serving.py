"""`unmix view`: a run folder in the browser."""

from __future__ import annotations

import threading
from pathlib import Path

from unmix.core.errors import ConfigError
from unmix.core.manifest import MANIFEST
from unmix.run.config import load_run
from unmix.run.context import RunContext


def serve_run(folder: Path, *, host: str = "127.0.0.1", port: int = 8017, open_browser: bool = False) -> None:
    """Serve until Ctrl-C. `ConfigError` where the folder is no run, or a run that has no index yet."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder")
    config = load_run(str(folder))
    context = RunContext(config, folder, {})
    if not (context.index_folder / MANIFEST).is_file():
        raise ConfigError(f"{folder}: has no index yet, so nothing to look at; finish it with: unmix run {folder}")
    from unmix.run.reporting import ModelPromptReader, run_data
    from unmix.viewer.server import serve

    data = run_data(context)
    # The model takes seconds to load; most users look at the overview first, so it loads behind it.
    threading.Thread(target=context.warm, daemon=True).start()
    serve(data, ModelPromptReader(context), host=host, port=port, open_browser=open_browser)
