"""`unmix convert`: write a coder in another format."""

from __future__ import annotations

import sys

from unmix.core.config import parse_overrides
from unmix.core.errors import ConfigError

USAGE = """usage: unmix convert SRC DST --format FORMAT

SRC is a coder's folder or file, or hf://owner/repo/path; DST a new folder. Formats that can be written: {formats}.
What a format cannot say is refused, with the reason.
"""


def command(arguments: list[str]) -> int:
    """Convert one coder."""
    from unmix.formats.registry import FORMATS, format_of

    if not arguments or arguments[0] in ("-h", "--help"):
        writable = [name for name in FORMATS.names() if format_of(name).writable]
        sys.stdout.write(USAGE.format(formats=", ".join(writable)))
        return 0
    if len(arguments) < 2:
        raise ConfigError("convert needs SRC and DST: unmix convert SRC DST --format FORMAT")
    options = parse_overrides(arguments[2:])
    unknown = set(options) - {"format"}
    if unknown or "format" not in options:
        raise ConfigError("convert needs --format FORMAT and takes nothing else; see unmix convert --help")
    from unmix.formats.loading import convert

    coder = convert(arguments[0], arguments[1], options["format"])
    sys.stdout.write(f"{coder!r}\nwritten to {arguments[1]} as {options['format']}\n")
    return 0
