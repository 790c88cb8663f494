"""Where a tensor can be read or replaced: the input or output of a module, through one permanent hook each.

A `Dispatcher` puts at most one hook on each side of a module and never takes it off. The hook asks a context
variable whether a `Pass` is running in *this* thread or task; without one it costs a dictionary look-up. So
threads that serve requests side by side never see each other's edits, and an exception leaves nothing behind.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unmix.core.errors import ModelError

Side = Literal["in", "out"]
Handler = Callable[[Tensor], Tensor | None]
"""Sees the tensor at a site; what it returns (unless `None`) takes its place."""

_RUNNING: ContextVar[Pass | None] = ContextVar("unmix_running_pass", default=None)


@dataclass(frozen=True)
class Site:
    """One side of one module; `path` is relative to the model (`""` is the model itself)."""

    path: str
    side: Side

    def __str__(self) -> str:
        return f"{self.path}@{self.side}"


class StopForward(BaseException):
    """Ends a forward pass once everything asked for was seen. Never leaves `Pass.stopping`.

    Not an `Exception`, so that no `except Exception` inside a model swallows it.
    """


def first_tensor(value: Any) -> Tensor | None:
    """The hidden states in a module's output: the tensor itself, or the first of a tuple, list or ModelOutput."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def replace_first(value: Any, tensor: Tensor) -> Any:
    """`value` with its hidden states replaced, in the same container type."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, dict):
        changed = value.copy()
        changed[next(iter(changed))] = tensor
        return changed
    if isinstance(value, list):
        return [tensor, *value[1:]]
    rest = (tensor, *value[1:])
    # A named tuple is built from its fields, a plain one from the sequence.
    return type(value)(*rest) if hasattr(value, "_fields") else rest


def input_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where a module's hidden states are: an index into `args` or a keyword; `None` where there is no tensor.

    Most attention modules are handed `hidden_states` by keyword.
    """
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return index
    return next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)


class Pass:
    """One forward pass: what to do at which site, and when everything needed has been seen."""

    def __init__(self, dispatcher: Dispatcher, shape: Sequence[int] | None = None) -> None:
        """`shape` is the inputs' [batch, pos]; it restores tensors that a family flattens to [batch·pos, d]."""
        self.dispatcher = dispatcher
        self.shape = None if shape is None else tuple(shape)
        self.stop = False
        self.skipped: dict[str, Tensor] = {}
        """Modules left out by path (see `Dispatcher.skipping`), and what each gives instead."""
        self._writers: dict[Site, list[Handler]] = {}
        self._readers: dict[Site, list[Handler]] = {}
        self._pending: set[Site] = set()

    def write(self, site: Site, handler: Handler) -> None:
        """Let `handler` replace the tensor at `site`."""
        self.dispatcher.ensure(site)
        self._writers.setdefault(site, []).append(handler)
        self._pending.add(site)

    def read(self, site: Site, handler: Callable[[Tensor], None]) -> None:
        """Show `handler` the tensor at `site` as it flows on, after every replacement there."""
        self.dispatcher.ensure(site)
        self._readers.setdefault(site, []).append(handler)
        self._pending.add(site)

    @property
    def pending(self) -> set[Site]:
        """Sites asked for that have not run yet."""
        return self._pending

    def visit(self, site: Site, tensor: Tensor) -> Tensor:
        """Run the handlers of `site`; the tensor that flows on, in the shape it came in."""
        shaped = self._restore(tensor)
        current = shaped
        for handler in self._writers.get(site, ()):
            replaced = handler(current)
            current = current if replaced is None else replaced
        for handler in self._readers.get(site, ()):
            handler(current)
        self._pending.discard(site)
        if self.stop and not self._pending:
            raise StopForward
        return tensor if current is shaped else current.view(tensor.shape)

    def wants(self, site: Site) -> bool:
        """Whether anything is to be done at `site`."""
        return site in self._writers or site in self._readers

    def _restore(self, tensor: Tensor) -> Tensor:
        shape = self.shape
        if shape is None or tensor.ndim != 2 or len(shape) != 2 or tensor.shape[0] != math.prod(shape):
            return tensor
        return tensor.view(*shape, tensor.shape[-1])

    @contextmanager
    def running(self) -> Generator[None]:
        """Make this the pass of the current thread or task while inside; the one before comes back after."""
        token = _RUNNING.set(self)
        try:
            yield
        except StopForward:
            pass
        finally:
            _RUNNING.reset(token)

    def check_seen(self) -> None:
        """`ModelError` naming every site that the forward pass never reached."""
        if self._pending:
            names = ", ".join(sorted(str(site) for site in self._pending))
            raise ModelError(f"never ran in the forward pass: {names}; the model does not call this module")


class Dispatcher:
    """The permanent hooks of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._installed: set[Site] = set()
        self._skippable: dict[str, tuple[int, Any]] = {}
        self._lock = threading.Lock()

    def module(self, path: str) -> nn.Module:
        """The module at `path`; `ModelError` where there is none."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise ModelError(f"{type(self.model).__name__} has no module {path!r}") from None

    def ensure(self, site: Site) -> None:
        """Put the hook of `site` in place, once."""
        if site in self._installed:
            return
        with self._lock:
            if site in self._installed:
                return
            module = self.module(site.path)
            if site.side == "in":
                module.register_forward_pre_hook(self._input_hook(site), with_kwargs=True)
            else:
                module.register_forward_hook(self._output_hook(site), with_kwargs=False)
            self._installed.add(site)

    @contextmanager
    def skipping(self, paths: Sequence[str]) -> Generator[None]:
        """Let passes leave out the modules at `paths` while inside; other threads' passes run them as ever.

        Each module's `forward` is shadowed by one that asks the pass first, and comes back with the last that leaves.
        """
        try:
            for path in paths:
                self._shadow(path)
            yield
        finally:
            for path in paths:
                self._unshadow(path)

    def _shadow(self, path: str) -> None:
        with self._lock:
            module = self.module(path)
            users, before = self._skippable.get(path, (0, module.__dict__.get("forward")))
            self._skippable[path] = (users + 1, before)
            if users:
                return
            inner = module.forward

            @functools.wraps(inner)
            def forward(*args: Any, **kwargs: Any) -> Any:
                current = _RUNNING.get()
                if current is None or current.dispatcher is not self or path not in current.skipped:
                    return inner(*args, **kwargs)
                return current.skipped[path]

            module.__dict__["forward"] = forward

    def _unshadow(self, path: str) -> None:
        with self._lock:
            users, before = self._skippable.pop(path, (1, None))
            if users > 1:
                self._skippable[path] = (users - 1, before)
            elif before is None:
                self.module(path).__dict__.pop("forward", None)
            else:
                self.module(path).__dict__["forward"] = before

    def _current(self, site: Site) -> Pass | None:
        current = _RUNNING.get()
        # Two LanguageModels may wrap one nn.Module: each answers to its own passes only.
        if current is None or current.dispatcher is not self or not current.wants(site):
            return None
        return current

    def _input_hook(self, site: Site) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            current = self._current(site)
            if current is None:
                return None
            key = input_key(args, kwargs)
            if key is None:
                raise ModelError(f"{site}: the module is handed no tensor")
            before = args[key] if isinstance(key, int) else kwargs[key]
            after = current.visit(site, before)
            if after is before:
                return None
            if isinstance(key, int):
                return (*args[:key], after, *args[key + 1 :]), kwargs
            return args, {**kwargs, key: after}

        return hook

    def _output_hook(self, site: Site) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            current = self._current(site)
            if current is None:
                return None
            before = first_tensor(output)
            if before is None:
                raise ModelError(f"{site}: the module returns no tensor but {type(output).__name__}")
            after = current.visit(site, before)
            return None if after is before else replace_first(output, after)

        return hook


def head_columns(width: int, head: int, size: int, name: str) -> slice:
    """The columns of one head of `size` in a row of heads `width` wide."""
    if width % size or (head + 1) * size > width:
        raise ModelError(f"{name}: a width of {width} holds {width // size} heads of {size}, so no head {head}")
    return slice(head * size, (head + 1) * size)


def put_slice(whole: Tensor, columns: slice, part: Tensor) -> Tensor:
    """`whole` with some columns of its last dimension replaced; gradients flow to both."""
    return torch.cat([whole[..., : columns.start], part, whole[..., columns.stop :]], dim=-1)
