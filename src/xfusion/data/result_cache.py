"""A thread-safe cache: each result is computed once, and the most recently used ones stay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class ResultCache(Generic[T]):
    """An LRU cache of a function's results. Unlike `functools.lru_cache`, concurrent threads do not call it twice.

    Args:
        make: computes a result; an error is raised in all threads that wait for it, and later calls try again.
        max_results: results to keep, including those being computed; the least recently used one is removed first.
    """

    def __init__(self, make: Callable[..., T], max_results: int) -> None:
        self.make, self.max_results = make, max_results
        self._futures: OrderedDict[tuple[Hashable, ...], Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *key: Hashable) -> T:
        with self._lock:
            future = self._futures.get(key)
            if future is None:
                while len(self._futures) >= self.max_results:  # before computing: both together would exceed the limit
                    self._futures.popitem(last=False)
                new_future: Future[T] = Future()
                self._futures[key] = new_future
            else:
                self._futures.move_to_end(key)
        if future is not None:
            return future.result()
        try:
            result = self.make(*key)
        except BaseException as error:
            self._forget(key, new_future)
            new_future.set_exception(error)
            raise
        new_future.set_result(result)
        return result

    def _forget(self, key: tuple[Hashable, ...], future: Future[T]) -> None:
        with self._lock:
            if self._futures.get(key) is future:
                del self._futures[key]

    def clear(self) -> None:
        """Remove all results."""
        with self._lock:
            self._futures.clear()
