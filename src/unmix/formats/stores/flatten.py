"""From what a pickle holds to dotted names: tensors on one side, everything else on the other."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from unmix.core.errors import FormatError
from unmix.formats.stores.globals import Bag, TensorRef

_DEPTH = 48
_NAME = 500
_PARTS = 500_000
"""Shared parts are counted at every mention, so a small pickle that mentions itself over and over ends here."""


def flatten(tree: Any, shown: str) -> tuple[dict[str, TensorRef], dict[str, Any]]:
    """Tensors and values by dotted name. Lists and bags without tensors stay whole values; mappings never do."""
    walk = _Walk(shown)
    walk.visit(tree, "", 0)
    return walk.tensors, walk.values


class _Walk:
    def __init__(self, shown: str) -> None:
        self.tensors: dict[str, TensorRef] = {}
        self.values: dict[str, Any] = {}
        self._shown = shown
        self._parts = 0
        self._holding: dict[int, bool] = {}

    def visit(self, node: Any, name: str, depth: int) -> None:
        """Add the leaves under `node`."""
        self._bound(depth)
        if isinstance(node, TensorRef):
            self._add(self.tensors, name, node)
        elif not (children := _children(node)) or not (isinstance(node, dict) or self._holds(node, depth)):
            self._weigh(node, depth)
            self._add(self.values, name, node)
        else:
            for key, child in children:
                self.visit(child, self._join(name, key), depth + 1)

    def _join(self, name: str, key: Any) -> str:
        if not isinstance(key, str | int) or len(_spelled(key)) > _NAME:
            raise FormatError(f"{self._shown}: under {name!r} is a key that cannot be a name: {_spelled(key)[:80]}")
        return f"{name}.{key}" if name else str(key)

    def _weigh(self, node: Any, depth: int) -> None:
        """Bound what is kept whole, counting every mention, so that whoever prints it is not drowned."""
        waiting = [(node, depth)]
        while waiting:
            node, depth = waiting.pop()
            inside: Collection[Any] = ()
            if isinstance(node, Bag):
                inside = (*node.attributes.values(), *node.args)
            elif isinstance(node, dict | list | tuple):
                inside = node.values() if isinstance(node, dict) else node
            self._parts += len(inside)
            if inside:
                self._bound(depth + 1)
            waiting.extend((child, depth + 1) for child in inside)

    def _holds(self, node: Any, depth: int) -> bool:
        """Whether a tensor is anywhere under `node`. Of what refers back to itself, only the first mention counts."""
        if isinstance(node, TensorRef):
            return True
        if id(node) not in self._holding:
            self._bound(depth)
            self._holding[id(node)] = False
            self._holding[id(node)] = any(self._holds(child, depth + 1) for _, child in _children(node) or ())
        return self._holding[id(node)]

    def _bound(self, depth: int) -> None:
        self._parts += 1
        if depth > _DEPTH or self._parts > _PARTS:
            limit = f"deeper than {_DEPTH} levels" if depth > _DEPTH else f"into more than {_PARTS:,} parts"
            raise FormatError(f"{self._shown}: its data are nested {limit}; refused")

    def _add(self, where: dict[str, Any], name: str, leaf: Any) -> None:
        if name in self.tensors or name in self.values:
            raise FormatError(f"{self._shown}: two entries are named {name!r}")
        where[name] = leaf


def _spelled(key: Any) -> str:
    """The key in words; Python itself refuses to spell out integers of thousands of digits."""
    return "a huge number" * 100 if isinstance(key, int) and abs(key) >= 1 << 64 else repr(key)


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Names and parts of a container; None for a leaf."""
    if isinstance(node, Bag):
        return list(node.attributes.items()) + [(f"args.{i}", arg) for i, arg in enumerate(node.args)]
    if isinstance(node, dict):
        return list(cast("dict[Any, Any]", node).items())
    if isinstance(node, list | tuple):
        return list(enumerate(cast("list[Any]", node)))
    return None
