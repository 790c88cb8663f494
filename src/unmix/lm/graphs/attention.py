"""What attention modules hand to their kernels: queries, keys and values, positions turned in, norms applied.

Hugging Face's models ask one registry for the kernel that computes softmax(QKᵀ)V. This file puts one permanent door
in front of that registry, as the dispatcher of `lm.sites` puts one hook on a module: without a watcher in this thread
it is what it was before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """One call of a kernel. Heads of keys and values may be fewer than those of queries."""

    query: Float[Tensor, "batch heads pos size"]
    key: Float[Tensor, "batch kv_heads pos size"]
    value: Float[Tensor, "batch kv_heads pos size"]
    scaling: float
    """What QKᵀ is multiplied by."""
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The kernel on other (query, key, value): [batch, pos, heads, size]."""


Watcher = Callable[[AttentionCall], tuple[Tensor, Tensor, Tensor]]
"""Sees a call and gives the (query, key, value) that the kernel shall have."""

_WATCHER: ContextVar[Watcher | None] = ContextVar("unmix_attention_watcher", default=None)
_LOCK = threading.Lock()


@contextmanager
def watching(watcher: Watcher) -> Generator[None]:
    """Let `watcher` stand between the attention modules and their kernels in this thread or task while inside."""
    _install()
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def _install() -> None:
    from transformers.modeling_utils import AttentionInterface

    with _LOCK:
        ask = AttentionInterface.get_interface
        if getattr(ask, "unmix", False):
            return

        def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
            kernel = ask(self, attn_implementation, default)
            watcher = _WATCHER.get()
            return kernel if watcher is None else _watched(kernel, watcher)

        get_interface.unmix = True  # pyright: ignore[reportFunctionMemberAccess]
        AttentionInterface.get_interface = get_interface


def _watched(kernel: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernel(module, q, k, v, *rest, **options)[0]

        scaling = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        q, k, v = watcher(AttentionCall(query, key, value, scale, run))
        return kernel(module, q, k, v, *rest, **options)

    return attend
