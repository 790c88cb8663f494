"""Sparse coders and their codes. Knows no language model.

Names load on first use, so that importing this room does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unmix.core.lazy import lazy_exports

if TYPE_CHECKING:
    from unmix.coder.coder_set import CoderSet, load_set
    from unmix.coder.codes import Codes
    from unmix.coder.config import CoderConfig
    from unmix.coder.identity import IdentityCoder
    from unmix.coder.native import load_native, save_native
    from unmix.coder.sparse_coder import CoderOutput, SparseCoder

__all__ = [
    "CoderConfig",
    "CoderOutput",
    "CoderSet",
    "Codes",
    "IdentityCoder",
    "SparseCoder",
    "load_native",
    "load_set",
    "save_native",
]

_exports = lazy_exports(
    {
        "CoderSet": "unmix.coder.coder_set",
        "load_set": "unmix.coder.coder_set",
        "Codes": "unmix.coder.codes",
        "CoderConfig": "unmix.coder.config",
        "IdentityCoder": "unmix.coder.identity",
        "load_native": "unmix.coder.native",
        "save_native": "unmix.coder.native",
        "CoderOutput": "unmix.coder.sparse_coder",
        "SparseCoder": "unmix.coder.sparse_coder",
    }
)


def __getattr__(name: str) -> Any:
    return _exports(__name__, name)
