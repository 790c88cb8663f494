"""What a pickle may name. Names are looked up in this table and nowhere else: no module is ever imported.

A pickle builds objects by calling what it names. Here a name becomes a `Maker`, our own function that only puts
data together, or a `BagClass`, whose instances hold attributes and have no behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from unmix.formats.stores.base import fits

Args = tuple[Any, ...]


class RefusedError(Exception):
    """A pickle that asks for what is not allowed; the message says what."""


@dataclass
class Bag:
    """An object of a class that was not imported: its class's dotted name and the attributes that were stored."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    args: Args = ()

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or `default`."""
        return self.attributes.get(name, default)


@dataclass(frozen=True)
class BagClass:
    """A class that pickles may name, and that is read as a `Bag`."""

    kind: str


@dataclass(frozen=True)
class Maker:
    """Our own function behind a name; `make` takes the arguments that the pickle gives."""

    name: str
    make: Callable[..., Any]


@dataclass(frozen=True)
class StorageType:
    """A kind of torch storage; `dtype` is None for untyped bytes."""

    dtype: torch.dtype | None


@dataclass(frozen=True)
class StorageRef:
    """One storage by its key, not yet found in the file."""

    key: str
    dtype: torch.dtype | None
    nbytes: int
    offset: int = 0
    """In bytes, for old files whose storages are views of others."""


@dataclass
class TensorRef:
    """A tensor as the pickle describes it: a strided window on a storage. Offset and strides count elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class NumpyType:
    """A numpy dtype being put together; only numbers and texts are allowed."""

    dtype: np.dtype[Any]


_BAGS = ("sae_training", "sae_lens", "mats_sae_training", "transformer_lens", "torch.nn.modules")
"""Modules (with all below them) whose classes are read as bags: trainers' configs, groups and layers."""

SCALARS = (str, int, float, bool, bytes, type(None))


def look_up(module: str, name: str, makers: Mapping[str, Maker]) -> Any:
    """What `module.name` stands for, in `makers` or in the table; `RefusedError` where it is in neither."""
    full = f"{module}.{name}"
    if full in makers:
        return makers[full]
    if full in _NAMES:
        return _NAMES[full]
    if any(module == allowed or module.startswith(allowed + ".") for allowed in _BAGS):
        return BagClass(full)
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    raise RefusedError(f"it asks for {full!r:.200}, which is not allowed")


def key_of(value: Any) -> Any:
    """`value` where it may be a key or a member of a set. Hashing anything nested could recurse without end."""
    if not isinstance(value, SCALARS):
        raise RefusedError(f"a {type(value).__name__} is used as a key, allowed are texts and numbers")
    return value


def _pairs(items: Iterable[Any] = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(cast("dict[Any, Any]", items))
    made: dict[Any, Any] = {}
    for item in items:
        if not isinstance(item, list | tuple) or len(cast("list[Any]", item)) != 2:
            raise RefusedError("a mapping is built from something else than pairs")
        made[key_of(item[0])] = item[1]
    return made


def _listed(items: Any = ()) -> list[Any]:
    if not isinstance(items, list | tuple | set | frozenset | dict):
        raise RefusedError(f"a list is built from a {type(items).__name__}")
    return list(cast("list[Any]", items))


def _set(items: Any = ()) -> set[Any]:
    return {key_of(item) for item in _listed(items)}


def _complex(real: Any, imaginary: Any = 0.0) -> complex:
    if not isinstance(real, int | float) or not isinstance(imaginary, int | float):
        raise RefusedError("a complex number is built from something else than numbers")
    return complex(real, imaginary)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode with {encoding!r:.40} is not allowed")
    return text.encode("latin1")


def _device(*parts: Any) -> str:
    return ":".join(str(part) for part in parts if isinstance(part, str | int))


def _reconstruct(kind: Any, base: Any, state: Any = None) -> Bag:
    """`copyreg._reconstructor`: how protocols 0 and 1 make an instance."""
    if not isinstance(kind, BagClass) or base != BagClass("builtins.object"):
        raise RefusedError("copyreg._reconstructor is asked for something else than a plain object")
    return Bag(kind.kind, args=() if state is None else (state,))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not fits(cast("list[Any]", value)):
        raise RefusedError(f"a shape or stride is {value!r:.80}, expected whole numbers ≥ 0")
    return tuple(cast("list[int]", value))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Any = None) -> TensorRef:
    dtype = dtype or (storage.dtype if isinstance(storage, StorageRef) else None)
    if not isinstance(storage, StorageRef) or not isinstance(dtype, torch.dtype):
        raise RefusedError("a tensor is built on something else than a storage")
    if type(offset) is not int or offset < 0 or len(_sizes(shape)) != len(_sizes(stride)):
        raise RefusedError(f"a tensor has offset {offset!r:.40}, shape {shape!r:.80} and stride {stride!r:.80}")
    return TensorRef(storage, dtype, offset, _sizes(shape), _sizes(stride))


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorRef:
    if len(rest) < 3:
        raise RefusedError("a tensor is built without its dtype")
    return _tensor(storage, offset, shape, stride, dtype=rest[2])


def _parameter(data: Any, *rest: Any) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise RefusedError("a parameter is built on something else than a tensor")
    return data


def _from_type(make: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor that had attributes of its own; they are left behind."""
    if not isinstance(make, Maker) or not make.name.startswith("torch._utils._rebuild") or not isinstance(args, tuple):
        raise RefusedError("a tensor is rebuilt by something else than torch's own functions")
    return make.make(*cast("Args", args))


def _numpy_type(code: Any, *rest: Any) -> NumpyType:
    if not isinstance(code, str) or len(code) > 8:
        raise RefusedError(f"numpy dtype {code!r:.40} is not allowed")
    try:
        dtype = np.dtype(code)
    except TypeError as error:
        raise RefusedError(f"numpy dtype {code!r} is unknown") from error
    if dtype.kind not in "biufcSU":
        raise RefusedError(f"numpy dtype {code!r} is not allowed")
    return NumpyType(dtype)


def _numpy_scalar(kind: Any, data: Any = None) -> Any:
    if not isinstance(kind, NumpyType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise RefusedError("a numpy number is not what its dtype says")
    return np.frombuffer(data, kind.dtype)[0].item()


def _storage_types() -> dict[str, StorageType]:
    dtypes = {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }  # fmt: skip
    found = {f"torch{place}.{name}Storage": StorageType(d) for name, d in dtypes.items() for place in ("", ".cuda")}
    untyped = StorageType(None)
    return found | {"torch.storage.UntypedStorage": untyped, "torch.UntypedStorage": untyped}


def _names() -> dict[str, Any]:
    makers: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _pairs,
        "_codecs.encode": _encode,
        "torch.Size": lambda items=(): _sizes(items),
        "torch.device": _device,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "numpy.dtype": _numpy_type,
    }
    for builtins in ("builtins", "__builtin__"):
        makers |= {
            f"{builtins}.set": _set, f"{builtins}.frozenset": lambda items=(): frozenset(_set(items)),
            f"{builtins}.list": _listed, f"{builtins}.tuple": lambda items=(): tuple(_listed(items)),
            f"{builtins}.dict": _pairs, f"{builtins}.slice": slice, f"{builtins}.complex": _complex,
        }  # fmt: skip
    makers |= dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), _reconstruct)
    makers |= dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar)
    plain = {name: BagClass("builtins.object") for name in ("builtins.object", "__builtin__.object")}
    classes = {name: BagClass(name) for name in ("torch.Tensor", "torch.nn.parameter.Parameter")}
    return {name: Maker(name, make) for name, make in makers.items()} | plain | classes | _storage_types()


_NAMES = _names()
