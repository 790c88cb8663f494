"""Where coders come from: a local path, the hub, W&B, a plain address, or a named release. One small file a source."""

from __future__ import annotations

from unmix.formats.sources.base import Fetched
from unmix.formats.sources.fetching import fetch, is_remote

__all__ = ["Fetched", "fetch", "is_remote"]
