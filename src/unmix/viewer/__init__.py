"""The viewer: a run as a static report, or served on this machine. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.viewer.data import RunFacts as RunFacts
    from unmix.viewer.data import collect as collect
    from unmix.viewer.report import write_report as write_report
    from unmix.viewer.server import Viewer as Viewer
    from unmix.viewer.server import serve as serve
    from unmix.viewer.server import start as start
    from unmix.viewer.shapes import PromptReader as PromptReader
    from unmix.viewer.shapes import PromptToken as PromptToken
    from unmix.viewer.shapes import ReportData as ReportData

_EXPORTS = {
    "PromptReader": "unmix.viewer.shapes",
    "PromptToken": "unmix.viewer.shapes",
    "ReportData": "unmix.viewer.shapes",
    "RunFacts": "unmix.viewer.data",
    "Viewer": "unmix.viewer.server",
    "collect": "unmix.viewer.data",
    "serve": "unmix.viewer.server",
    "start": "unmix.viewer.server",
    "write_report": "unmix.viewer.report",
}
_resolve = lazy_exports(_EXPORTS)


def __getattr__(name: str) -> Any:
    return _resolve(__name__, name)
