"""The one HTML page of the viewer: it holds no data, only where the data comes from."""

from __future__ import annotations

import base64
import html
from importlib import resources
from typing import Literal

from unmix.core.errors import MachineError
from unmix.metrics.windows import visible

SCRIPT, STYLE = "unmix.js", "unmix.css"

POLICY_SERVED = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
POLICY_STATIC = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
"""A page opened from a disk has no origin that 'self' could mean in every browser, hence `file:`."""

# Three bars of one mixed stripe, as the app's own mark.
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Crect x='1' y='2' width='14' height='3' rx='1.5' fill='%23d97706'/%3E"
    "%3Crect x='1' y='6.5' width='9' height='3' rx='1.5' fill='%230f766e'/%3E"
    "%3Crect x='1' y='11' width='5' height='3' rx='1.5' fill='%23787670'/%3E%3C/svg%3E"
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<meta name="unmix" content="{source}" data-token="{token}">
<title>{title} · unmix</title>
<link rel="icon" href="{icon}">
<link rel="stylesheet" href="{style}">
</head>
<body>
<div id="app"></div>
{below}<noscript>This page draws itself with JavaScript, which is switched off here.</noscript>
{scripts}
</body>
</html>
"""


_CURVES = """<details id="training"><summary>Training curves</summary>
<img alt="Loss, FVU, L0 and dead latents by step" src="data:image/svg+xml;base64,{source}"></details>
"""


def index_html(name: str, source: Literal["static", "served"], token: str = "", curves: str | None = None) -> str:
    """The page of run `name`; `token` is what a served page shows with its POSTs, `curves` an SVG put below the app."""
    scripts = ["data/run.js", SCRIPT] if source == "static" else [SCRIPT]
    return _PAGE.format(
        policy=html.escape(POLICY_STATIC if source == "static" else POLICY_SERVED),
        source=source,
        token=html.escape(token),
        title=html.escape(visible(name)),
        icon=html.escape(_ICON),
        style=STYLE,
        below="" if curves is None else _CURVES.format(source=base64.b64encode(curves.encode()).decode()),
        scripts="\n".join(f'<script src="{script}"></script>' for script in scripts),
    )


def asset(name: str) -> bytes:
    """A file of the built app. `MachineError` where the installation lacks it."""
    path = resources.files("unmix.viewer") / "static" / name
    if not path.is_file():
        raise MachineError(f"{path}: missing from this installation; install unmix again (or, in web/: npm run build)")
    return path.read_bytes()
