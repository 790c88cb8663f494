"""What every kind of file gives: headers without data, tensors one by one, and the values beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmix.core.errors import FormatError, did_you_mean


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a stored tensor, known without reading its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when it is contiguous."""
        return count(self.shape) * self.dtype.itemsize


class Store(ABC):
    """An open file of tensors. Names of nested mappings are joined by dots: `state_dict.W_enc`."""

    shown: str
    """How messages name the file."""

    @abstractmethod
    def headers(self) -> Mapping[str, Header]:
        """Every tensor in the file, by name. A file that is one bare tensor calls it by the empty string."""

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """The tensor `key`, which is known to be there."""

    @property
    def values(self) -> Mapping[str, Any]:
        """What is not a tensor, by dotted name: numbers, texts, lists, bags of attributes."""
        return {}

    def tensor(self, key: str) -> Tensor:
        """The tensor `key` on the CPU in its stored dtype, memory-mapped where the file allows (writes stay private).

        `FormatError` where there is none of that name, `CorruptError` where its data is broken.
        """
        if key not in self.headers():
            raise FormatError(f"{self.shown}: no tensor {key!r}. {did_you_mean(key, self.headers())}")
        return self.read(key)


def count(shape: tuple[int, ...]) -> int:
    """Elements of a shape: a product that cannot overflow, unlike a C library's."""
    product = 1
    for size in shape:
        product *= size
    return product


def fits(numbers: Sequence[Any]) -> bool:
    """Whether these can be the sizes, strides or offsets of a tensor: at most 64 whole numbers from 0 to 2⁶³ − 1."""
    return len(numbers) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
