"""Work that is done ahead in a thread of its own, in the order it was asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Ahead(Generic[K, V]):
    """Results of `make(key)`, made one at a time by one background thread, and the last `keep` of them kept.

    Every result comes from that thread, whether it was foreseen or not, so that it is the same either way. What
    `make` raises is raised where the result is taken. The thread ends with the object.
    """

    def __init__(self, make: Callable[[K], V], keep: int, name: str) -> None:
        self._make, self._keep, self._name = make, keep, name
        self._held: OrderedDict[K, Future[V]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def take(self, key: K, after: Sequence[K] = ()) -> V:
        """The result of `key`, waited for; `after` are the keys that will be asked for next, begun now."""
        with self._lock:
            future = self._begin(key)
            for wanted in (*after, key):
                self._begin(wanted)
                self._held.move_to_end(wanted)
            self._forget({key, *after})
        try:
            return future.result()
        except BaseException:
            with self._lock:  # so that a later call tries again
                self._held.pop(key, None)
            raise

    def close(self) -> None:
        """Drop what was not begun, and wait for what was."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._held.clear()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, key: K) -> Future[V]:
        if key not in self._held:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
            self._held[key] = self._pool.submit(self._make, key)
        return self._held[key]

    def _forget(self, wanted: set[K]) -> None:
        for key in list(self._held):
            if len(self._held) <= self._keep:
                return
            if key not in wanted:
                self._held.pop(key).cancel()
