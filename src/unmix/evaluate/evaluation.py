"""The result of an evaluation: metrics with intervals, and everything one must know to read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmix.core.atomic import write_json
from unmix.core.errors import CorruptError, did_you_mean
from unmix.metrics.intervals import Estimate

SCHEMA = 1


@dataclass(frozen=True)
class Evaluation(Mapping[str, dict[str, float | None]]):
    """A read-only mapping `{metric: {"value", "low", "high"}}`.

    `value` is `None` where a metric is undefined (0/0); `low` and `high` are `None` where no interval can be
    formed (one context, or a count over the dictionary).
    """

    metrics: dict[str, Estimate]
    histogram: dict[str, Any]
    """Latents by log10 of their frequency; see `Sparsity.histogram`."""
    settings: dict[str, Any] = field(default_factory=lambda: {})
    """What was measured and how: model, coder, hooks, data, mask, positions, token counts, error mode, intervals."""

    def __getitem__(self, name: str) -> dict[str, float | None]:
        """One metric; `KeyError` names the nearest ones."""
        if name not in self.metrics:
            raise KeyError(f"no metric {name!r}. {did_you_mean(name, self.metrics)}")
        return self.metrics[name].as_dict()

    def __iter__(self) -> Iterator[str]:
        """Names of the metrics."""
        return iter(self.metrics)

    def __len__(self) -> int:
        """Number of metrics."""
        return len(self.metrics)

    def value(self, name: str) -> float | None:
        """A metric without its interval."""
        return self[name]["value"]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "schema": SCHEMA,
            "metrics": {name: estimate.as_dict() for name, estimate in self.metrics.items()},
            "frequency_histogram": self.histogram,
            "settings": self.settings,
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, self.as_dict())

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Evaluation:
        """The inverse of `as_dict`."""
        metrics = {name: Estimate(**entry) for name, entry in tree["metrics"].items()}
        return cls(metrics, dict(tree["frequency_histogram"]), dict(tree["settings"]))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what `save` wrote; `CorruptError` where it is not that."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            if tree["schema"] != SCHEMA:
                raise CorruptError(f"{path}: schema {tree['schema']!r}, this version reads {SCHEMA}")
            return cls.from_dict(tree)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise CorruptError(f"{path}: not an evaluation ({type(error).__name__}: {error})") from error
