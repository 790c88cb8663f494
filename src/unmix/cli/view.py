"""`unmix view`: the viewer of a run on 127.0.0.1."""

from __future__ import annotations

import sys
from pathlib import Path

from unmix.core.config import parse_overrides
from unmix.core.errors import ConfigError, did_you_mean

USAGE = """usage: unmix view RUN [--port N] [--host ADDRESS] [--open yes|no]

Serves a run folder: figures, latents with their names and scores, evidence for every latent, and a box where a typed
text shows its strongest latents. Stop with Ctrl-C.

  --port N        default 8017
  --host ADDRESS  default 127.0.0.1: this machine only
  --open yes|no   open the browser (default no)
"""
OPTIONS = ("port", "host", "open")


def command(arguments: list[str]) -> int:
    """Serve until interrupted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    options = parse_overrides(arguments[1:])
    for key in options:
        if key not in OPTIONS:
            raise ConfigError(f"unknown option --{key}. {did_you_mean(key, OPTIONS)}")
    port = options.get("port", "8017")
    if not port.isdigit() or not 0 <= int(port) < 65536:
        raise ConfigError(f"--port: found {port!r}, allowed 0 to 65535")
    from unmix.run.serving import serve_run

    serve_run(
        Path(arguments[0]),
        port=int(port),
        host=options.get("host", "127.0.0.1"),
        open_browser=options.get("open", "no") == "yes",
    )
    return 0
