"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from unmix.core.config import parse_count
from unmix.core.errors import ConfigError

_BYTES = re.compile(r"^\s*([0-9.,_]+)\s*([kmgt])i?b?\s*$|^\s*([0-9.,_]+)\s*b?\s*$", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(flag: str, text: str) -> int:
    """`2GiB`, `2G` (powers of 1024), `500MB` (of 1000) or a plain number; `ConfigError` for anything else."""
    match = _BYTES.match(text)
    number = parse_count(match[1] or match[3]) if match else None
    if match is None or not isinstance(number, (int, float)) or number <= 0:
        raise ConfigError(f"--{flag} {text}: expected a number of bytes, such as 2GiB or 500MB")
    letter = (match[2] or "").lower()
    base = 1000 if text.lower().rstrip().endswith("b") and "i" not in text.lower() else 1024
    return int(number * base ** _POWER[letter]) if letter else int(number)
