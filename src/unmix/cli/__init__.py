"""The command line: one small file a command, loaded only when it is asked for.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 2 the user's input, 3 the machine or a
service, 4 corrupt or non-finite data, 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from unmix._version import __version__

COMMANDS = {
    "run": "every stage of a run file, in order; goes on where it was stopped",
    "train": "a run file up to the trained coder",
    "evaluate": "a run file up to the evaluation",
    "index": "where every latent fires: build an index; figures, joining, mending, exchange of one",
    "diff": "latents that differ between two corpora, two models or two slices of an index",
    "explain": "a run file up to the explanations",
    "score": "a run file up to the scores",
    "report": "a run file up to the static report",
    "view": "look at a run in the browser, on 127.0.0.1",
    "inspect": "what a coder is: shapes, hooks, activation, norms, health",
    "convert": "write a coder in another format",
    "releases": "published coders that can be loaded by name",
    "steer": "what a model writes with latents changed, beside what it writes without",
    "graph": "which latents, through which, made a model say its next token",
    "attribute": "which latents a model's next token comes from",
    "lens": "latents read through the unembedding, or through a fitted Jacobian lens",
    "plan": "memory, messages, time and cost of a training, before it starts",
    "lm-train": "a small language model of one's own, from text",
    "verify": "check every hash of a coder, index, report or run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    quiet = "--quiet" in arguments
    arguments = [word for word in arguments if word not in ("--debug", "--quiet")]
    _log_to_stderr(quiet)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if arguments[0] in ("--version", "-V"):
        sys.stdout.write(f"unmix {__version__}\n")
        return 0
    return _guarded(arguments, debug)


def usage() -> str:
    """The text of `unmix --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return (
        "usage: unmix COMMAND … [--section.field VALUE …]\n\n"
        "Train, load, bind, evaluate, index, explain and look at sparse coders of language models.\n\n"
        + "\n".join(lines)
        + "\n\nunmix COMMAND --help says more. Everywhere: --quiet (no progress), --debug (tracebacks), --version.\n"
    )


def _guarded(arguments: list[str], debug: bool) -> int:
    from unmix.core.errors import ConfigError, UnmixError, did_you_mean

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        name = arguments[0]
        if name not in COMMANDS:
            raise ConfigError(f"unknown command {name!r}. {did_you_mean(name, COMMANDS)}")
        module = importlib.import_module(f"unmix.cli.{name.replace('-', '_')}")
        code: int = module.command(arguments[1:])
        return code
    except UnmixError as error:
        if debug:
            raise
        sys.stderr.write(f"unmix: {error}\n")
        return error.exit_code
    except KeyboardInterrupt as stop:
        if debug:
            raise
        # torchrun stops the others as soon as one rank is gone, while they still say so themselves.
        if isinstance(stop.__context__, UnmixError):
            sys.stderr.write(f"unmix: {stop.__context__}\n")
            return stop.__context__.exit_code
        sys.stderr.write("unmix: interrupted; what was finished is kept, the same command goes on from there\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        from unmix.core.atomic import disk_fault

        reason = disk_fault(error)
        if debug or reason is None:
            raise
        sys.stderr.write(f"unmix: {error.filename or 'the disk'}: {reason}\n")
        return 3


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is now: a caller may have put another stream there since the first command."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _log_to_stderr(quiet: bool) -> None:
    logger = logging.getLogger("unmix")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if not logger.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
