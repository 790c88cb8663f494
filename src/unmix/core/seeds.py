"""Seeds derived by name, so that no two parts of a run ever share a random stream."""

from __future__ import annotations

import hashlib


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on every label; the same on every machine."""
    text = "\x1f".join([str(seed), *[str(label) for label in labels]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def slug(text: str) -> str:
    """A name fit for a folder: letters, digits, dots, dashes and underscores; the rest becomes a dash."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
    return kept.strip("-.") or "coder"
