"""A thread-safe cache: each result is computed once, and the most recently used ones stay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """An LRU cache of a function's results. Unlike `functools.lru_cache`, concurrent threads do not call it twice.

    Args:
        make: computes a result; an error is raised in all threads that wait for it, and later calls try again.
        most: results to keep, including those being computed; the least recently used one is removed first.
    """

    def __init__(self, make: Callable[..., T], most: int) -> None:
        self.make, self.most = make, most
        self._known: OrderedDict[tuple[Hashable, ...], Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *key: Hashable) -> T:
        with self._lock:
            known = self._known.get(key)
            if known is None:
                while len(self._known) >= self.most:  # before computing: both together would exceed the limit
                    self._known.popitem(last=False)
                mine: Future[T] = Future()
                self._known[key] = mine
            else:
                self._known.move_to_end(key)
        if known is not None:
            return known.result()
        try:
            made = self.make(*key)
        except BaseException as error:
            self._forget(key, mine)
            mine.set_exception(error)
            raise
        mine.set_result(made)
        return made

    def _forget(self, key: tuple[Hashable, ...], one: Future[T]) -> None:
        with self._lock:
            if self._known.get(key) is one:
                del self._known[key]

    def clear(self) -> None:
        """Remove all results."""
        with self._lock:
            self._known.clear()
