"""`unmix convert`: write a coder in another format."""

from __future__ import annotations

import sys

from unmix.core.config import parse_overrides
from unmix.core.errors import ConfigError

USAGE = """usage: unmix convert SRC DST --format FORMAT [--from FORMAT] [--name CODER]

SRC is a coder's folder or file, hf://owner/repo/path or release:NAME/ID; DST a new folder. Where SRC holds several
coders, all are written, or the one that --name names. --from says SRC's format where several fit.
Formats that can be written: {formats}.
What a format cannot say is refused, with the reason. Memory holds one tensor at a time.
"""


def command(arguments: list[str]) -> int:
    """Convert the coders of one place."""
    from unmix.formats.registry import FORMATS, format_of

    if not arguments or arguments[0] in ("-h", "--help"):
        writable = [name for name in FORMATS.names() if format_of(name).writable]
        sys.stdout.write(USAGE.format(formats=", ".join(writable)))
        return 0
    if len(arguments) < 2:
        raise ConfigError("convert needs SRC and DST: unmix convert SRC DST --format FORMAT")
    options = parse_overrides(arguments[2:])
    unknown = set(options) - {"format", "from", "name"}
    if unknown or "format" not in options:
        raise ConfigError(
            "convert needs --format FORMAT, and takes --from FORMAT and --name CODER; see unmix convert --help"
        )
    from unmix.formats.loading import convert

    src, dst = arguments[:2]
    names = convert(src, dst, str(options["format"]), options.get("from"), options.get("name"))
    listed = ", ".join(names[:12]) + (f", … ({len(names) - 12} more)" if len(names) > 12 else "")
    sys.stdout.write(f"{listed}\nwritten to {dst} as {options['format']}\n")
    return 0
