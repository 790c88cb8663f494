"""JSON as the viewer sends it: ASCII only, finite only, and never able to end a script or a line of one.

Tokens may hold anything, lone surrogates included, so `ensure_ascii` is what keeps the bytes valid; `<`, `>` and `&`
are escaped as well, because the same text is written into `.js` files.
"""

from __future__ import annotations

import json
import math
from typing import Any, cast

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def to_json(value: Any) -> str:
    """Compact ASCII JSON. NaN and infinity become null: they are shown as missing, never as a number."""
    return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def to_script(name: str, value: Any) -> str:
    """A classic script that puts `value` at `window.__unmix[name]`, in whatever order scripts arrive.

    Values must not carry dictionary keys that come from data (`__proto__` means something in a script); the shapes
    of `unmix.viewer.shapes` keep such names in lists.
    """
    return f"(window.__unmix=window.__unmix||{{}})[{json.dumps(name)}]={to_json(value)};\n"


def number(value: Any) -> float | None:
    """A finite float with four significant digits, which is what is shown; None for what is not one."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{result:.4g}") if math.isfinite(result) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in cast("list[Any]", value)]
    return value
