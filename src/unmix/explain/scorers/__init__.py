"""Scorers: one file each, of one of two shapes (`scorers/base.py`)."""

from __future__ import annotations

from unmix.core.plugins import Registry

SCORERS = Registry(
    "unmix.scorers",
    "scorer",
    {
        "pattern": "unmix.explain.scorers.pattern:PatternScorer",
        "detection": "unmix.explain.scorers.detection:DetectionScorer",
        "fuzzing": "unmix.explain.scorers.fuzzing:FuzzingScorer",
    },
)
