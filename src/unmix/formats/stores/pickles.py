"""A pickle reader that runs nothing: each opcode is carried out here, on plain data, with `pickletools` as the lexer.

Python's own unpickler would import and call what a file names. This one knows no import and no call: see `globals`.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, cast

from unmix.core.errors import CorruptError, FormatError
from unmix.formats.stores.globals import (
    Args,
    Bag,
    BagClass,
    Maker,
    NumpyType,
    RefusedError,
    StorageType,
    TensorRef,
    key_of,
    look_up,
)

Persistent = Callable[[Any], Any]
_MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError, Warning)
"""What the lexer and our own handling of data raise; a warning where the user made warnings errors."""
_MARK = object()
_SIZED = (str, bytes, list, tuple, dict, set, frozenset)
_LITERALS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
}  # fmt: skip
_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "FLOAT",
    "BINFLOAT",
}  # fmt: skip


def unpickle(
    stream: io.BufferedReader,
    shown: str,
    persistent: Persistent | None = None,
    makers: Mapping[str, Maker] | None = None,
) -> Any:
    """The data of the pickle at the stream's position, which ends right behind it.

    `persistent` resolves persistent ids (torch's storages), `makers` are names allowed besides the table.
    `FormatError` for anything that is not allowed, naming it; `CorruptError` for what is not a sound pickle.
    """
    here = stream.tell()
    machine = _Machine(persistent, makers or {}, budget=(1 << 16) + 4 * (stream.seek(0, 2) - here))
    stream.seek(here)
    try:
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, arg)
    except RefusedError as error:
        raise FormatError(f"{shown}: this pickle is refused: {error}; nothing in it was run") from error
    except _MALFORMED as error:
        raise CorruptError(f"{shown}: not a sound pickle ({type(error).__name__}: {str(error)[:200]})") from error
    raise CorruptError(f"{shown}: a pickle without an end")


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, persistent: Persistent | None, makers: Mapping[str, Maker], budget: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._persistent, self._makers = persistent, makers
        self._budget = budget

    def pop(self) -> Any:
        """The top of the stack."""
        if self.stack[-1] is _MARK:
            raise ValueError("a mark where a value should be")
        return self.stack.pop()

    def step(self, name: str, arg: Any) -> None:
        """Carry out one opcode."""
        if name in _PUSHED:
            self.stack.append(arg)
        elif name in _LITERALS:
            self.stack.append(_LITERALS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, arg)
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"it uses the opcode {name}, which is not allowed")

    def marked(self) -> list[Any]:
        """What was pushed since the last mark, which goes too."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("no mark on the stack")

    def pop_any(self) -> None:
        """Drop the top of the stack, be it a mark."""
        self.stack.pop()

    def top(self, kind: type) -> Any:
        """The value on top, which must be exactly a `kind`."""
        if type(self.stack[-1]) is not kind:
            raise RefusedError(f"a {type(self.stack[-1]).__name__} is filled like a {kind.__name__}")
        return self.stack[-1]

    def put(self, index: int) -> None:
        """Keep the top of the stack under a number."""
        if self.stack[-1] is _MARK:
            raise ValueError("a mark where a value should be")
        self.memo[index] = self.stack[-1]

    def tuple_of(self, n: int) -> None:
        """Replace the `n` values on top by their tuple."""
        items = [self.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(items)))

    def set_items(self, flat: list[Any]) -> None:
        """Add keys and values, in turns, to the mapping on top."""
        target = self.top(dict)
        if len(flat) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[key_of(key)] = value

    def name(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        return look_up(module, name, self._makers)

    def spend(self, parts: Iterable[Any]) -> None:
        """Bound what is copied: a few bytes can ask for a copy of something large, over and over."""
        self._budget -= sum(len(cast("Sized", part)) for part in parts if isinstance(part, _SIZED))
        if self._budget < 0:
            raise RefusedError("it unfolds to far more than its own length")

    def make(self, named: Any, args: Any) -> None:
        """Push what `named` makes of `args`: data, never the result of a call into other code."""
        if not isinstance(args, tuple):
            raise RefusedError(f"{_shown(named)} is given a {type(args).__name__}, expected arguments")
        args = cast("Args", args)
        self.spend(args)
        if isinstance(named, BagClass):
            self.stack.append(Bag(named.kind, args=args))
        elif isinstance(named, Maker):
            self.stack.append(named.make(*args))
        else:
            raise RefusedError(f"it calls {_shown(named)}, which is not allowed")

    def new(self, keywords: bool) -> None:
        """NEWOBJ and NEWOBJ_EX."""
        extra: Any = None
        if keywords:
            extra = self.pop()
            if not isinstance(extra, dict):
                raise RefusedError("a class is given keywords that are not a mapping")
        args, named = self.pop(), self.pop()
        self.make(named, args)
        if keywords and isinstance(self.stack[-1], Bag):
            self.spend([extra])
            self.stack[-1].attributes.update(_texts(extra))

    def called(self, named: Any | None) -> None:
        """INST and OBJ: a name and what follows the mark."""
        items = self.marked()
        if named is None:
            named, *items = items
        self.make(named, tuple(items))

    def build(self) -> None:
        """Give the object on top its state; nothing but bags keeps it."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Bag):
            parts = cast("Args", state) if isinstance(state, tuple) and len(cast("Args", state)) == 2 else (state,)
            if all(part is None or isinstance(part, dict) for part in parts):
                self.spend(parts)
                for part in parts:
                    target.attributes.update(_texts(part or {}))
            else:
                target.attributes["__state__"] = state
        elif isinstance(target, NumpyType):
            order = cast("Args", state)[1] if isinstance(state, tuple) and len(cast("Args", state)) > 1 else "|"
            if order not in ("<", ">", "|", "="):
                raise RefusedError(f"a numpy dtype of byte order {order!r:.20}")
            target.dtype = target.dtype.newbyteorder(order)
        elif not isinstance(target, dict | TensorRef):
            raise RefusedError(f"a {type(target).__name__} is given a state")

    def persistent(self, key: Any) -> None:
        """A reference to data outside the pickle."""
        if self._persistent is None:
            raise RefusedError("it refers to data outside itself")
        self.stack.append(self._persistent(key))


def _shown(named: Any) -> str:
    if isinstance(named, BagClass | Maker):
        return named.kind if isinstance(named, BagClass) else named.name
    return "a storage" if isinstance(named, StorageType) else f"a {type(named).__name__}"


def _texts(state: Any) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in state):
        raise RefusedError("an attribute's name is not a text")
    return cast("dict[str, Any]", state)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise RefusedError("it asks for a name that is not a text")
    machine.stack.append(machine.name(module, name))


def _reduce(machine: _Machine) -> None:
    args, named = machine.pop(), machine.pop()
    machine.make(named, args)


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _dict(machine: _Machine) -> None:
    items = machine.marked()
    machine.stack.append({})
    machine.set_items(items)


def _named(machine: _Machine, arg: str) -> Any:
    module, _, name = arg.partition(" ")
    return machine.name(module, name)


_Action = Callable[[_Machine, Any], object]
_ACTIONS: dict[str, _Action] = {
    "MARK": lambda m, _: m.stack.append(_MARK),
    "POP": lambda m, _: m.pop_any(),
    "POP_MARK": lambda m, _: m.marked(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "LIST": lambda m, _: m.stack.append(m.marked()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "DICT": lambda m, _: _dict(m),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(key_of(item) for item in m.marked())),
    "APPEND": lambda m, _: _append(m),
    "APPENDS": lambda m, _: _appends(m),
    "SETITEM": lambda m, _: _set_item(m),
    "SETITEMS": lambda m, _: m.set_items(m.marked()),
    "ADDITEMS": lambda m, _: _add_items(m),
    "PUT": lambda m, arg: m.put(int(arg)),
    "BINPUT": lambda m, arg: m.put(arg),
    "LONG_BINPUT": lambda m, arg: m.put(arg),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GET": lambda m, arg: m.stack.append(m.memo[int(arg)]),
    "BINGET": lambda m, arg: m.stack.append(m.memo[arg]),
    "LONG_BINGET": lambda m, arg: m.stack.append(m.memo[arg]),
    "GLOBAL": lambda m, arg: m.stack.append(_named(m, arg)),
    "STACK_GLOBAL": lambda m, _: _stack_global(m),
    "INST": lambda m, arg: m.called(_named(m, arg)),
    "OBJ": lambda m, _: m.called(None),
    "REDUCE": lambda m, _: _reduce(m),
    "NEWOBJ": lambda m, _: m.new(keywords=False),
    "NEWOBJ_EX": lambda m, _: m.new(keywords=True),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, arg: m.persistent(arg),
    "BINPERSID": lambda m, _: m.persistent(m.pop()),
}


def _appends(machine: _Machine) -> None:
    items = machine.marked()
    machine.top(list).extend(items)


def _add_items(machine: _Machine) -> None:
    items = machine.marked()
    machine.top(set).update(key_of(item) for item in items)
