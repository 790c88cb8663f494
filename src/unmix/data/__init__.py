"""Text and tokens: corpora, tokenisation into packed shards with roles, and the order in which they are read.

Names load on first use, so that importing this room does not import NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.data.config import ROLES, DataConfig, Role
    from unmix.data.corpora import find_source, open_corpus
    from unmix.data.order import Order
    from unmix.data.policy import resolve_policy
    from unmix.data.shards import TokenShards
    from unmix.data.sources.base import Document, Source
    from unmix.data.tokenise import tokenise

__all__ = [
    "ROLES",
    "DataConfig",
    "Document",
    "Order",
    "Role",
    "Source",
    "TokenShards",
    "find_source",
    "open_corpus",
    "resolve_policy",
    "tokenise",
]

_exports = lazy_exports(
    {
        "DataConfig": "unmix.data.config",
        "ROLES": "unmix.data.config",
        "Role": "unmix.data.config",
        "find_source": "unmix.data.corpora",
        "open_corpus": "unmix.data.corpora",
        "Order": "unmix.data.order",
        "resolve_policy": "unmix.data.policy",
        "TokenShards": "unmix.data.shards",
        "Document": "unmix.data.sources.base",
        "Source": "unmix.data.sources.base",
        "tokenise": "unmix.data.tokenise",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
