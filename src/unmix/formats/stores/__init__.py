"""Files that hold tensors, opened by their content and never by their suffix. Nothing in them is ever run."""

from __future__ import annotations

from unmix.formats.stores.base import Header, Store
from unmix.formats.stores.finite import is_finite
from unmix.formats.stores.globals import Bag
from unmix.formats.stores.opening import open_store
from unmix.formats.stores.torch_writing import write_torch
from unmix.formats.stores.writing import write_safetensors, write_sharded

__all__ = ["Bag", "Header", "Store", "is_finite", "open_store", "write_safetensors", "write_sharded", "write_torch"]
