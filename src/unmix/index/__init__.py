"""The latent index: an inverted index in which latents are the terms and token positions the documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.index.build import IndexBatch as IndexBatch
    from unmix.index.build import build_index as build_index
    from unmix.index.build import stats as stats
    from unmix.index.build import verify as verify
    from unmix.index.differences.comparison import diff as diff
    from unmix.index.joining import join as join
    from unmix.index.latent import Latent as Latent
    from unmix.index.reader import CoderIndex as CoderIndex
    from unmix.index.reader import LatentIndex as LatentIndex
    from unmix.index.reader import open_index as open_index
    from unmix.index.repairing import repair as repair
    from unmix.index.sets import LatentSet as LatentSet
    from unmix.index.windows import Window as Window
    from unmix.index.writer import IndexWriter as IndexWriter

_EXPORTS = {
    "CoderIndex": "unmix.index.reader",
    "IndexBatch": "unmix.index.build",
    "IndexWriter": "unmix.index.writer",
    "Latent": "unmix.index.latent",
    "LatentIndex": "unmix.index.reader",
    "LatentSet": "unmix.index.sets",
    "Window": "unmix.index.windows",
    "build_index": "unmix.index.build",
    "diff": "unmix.index.differences.comparison",
    "join": "unmix.index.joining",
    "open_index": "unmix.index.reader",
    "repair": "unmix.index.repairing",
    "stats": "unmix.index.build",
    "verify": "unmix.index.build",
}
_resolve = lazy_exports(_EXPORTS)


def __getattr__(name: str) -> Any:
    return _resolve(__name__, name)
