"""Attribution graphs: which latents made the model say that, through transcoders, with attention and norms held."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.lm.graphs.build import attribution_graph
    from unmix.lm.graphs.graph import AttributionGraph, Edge, Node
    from unmix.lm.graphs.replacement import LocalReplacement

_NAMES = {
    "AttributionGraph": "unmix.lm.graphs.graph",
    "Edge": "unmix.lm.graphs.graph",
    "LocalReplacement": "unmix.lm.graphs.replacement",
    "Node": "unmix.lm.graphs.graph",
    "attribution_graph": "unmix.lm.graphs.build",
}

__all__ = ["AttributionGraph", "Edge", "LocalReplacement", "Node", "attribution_graph"]

_exports = lazy_exports(_NAMES)


def __getattr__(name: str) -> object:
    return _exports(__name__, name)
